"""The packages that a command imports in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

HEAVY = {"lightning", "torchmetrics", "transformers", "scipy", "sklearn", "datasets"}
"""Packages that no command but training needs, besides torch; importing lightning imports most of them."""

PROGRAM = """
import importlib, sys
command, sys.argv = sys.argv[1], sys.argv[1:]
try:
    importlib.import_module("cucafera." + command).main()
except SystemExit as end:
    code = end.code
else:
    code = 0
print(code or 0, *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


def imported_packages(command: str, arguments: list[str], folder: Path, code: int) -> set[str]:
    """Run a command in a folder, check its exit code, and return the top-level packages that it imported."""
    process = [sys.executable, "-c", PROGRAM, command, *arguments]
    done = subprocess.run(process, cwd=folder, capture_output=True, text=True, timeout=300)
    found, *packages = done.stderr.splitlines()[-1].split()
    assert found == str(code), done.stderr
    return set(packages)
