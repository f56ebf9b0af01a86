"""Trains a small Catalan language model, from raw text to a chat model, from one configuration system."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":  # every command imports this before a module that Windows lacks
    print("cucafera needs Linux or macOS; on Windows, run it in WSL (Windows Subsystem for Linux).", file=sys.stderr)
    sys.exit(2)
