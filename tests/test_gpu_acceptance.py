"""The GPU acceptance script on a machine without a GPU: its results, and stages that fail."""

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.model.flops import parameter_count
from tests.support import CUCAFERA, ROOT, load_script, run_command

FACTS = {"date": "2026-01-01", "small": True, "command": "python scripts/gpu_acceptance.py"}


@pytest.fixture
def script():
    return load_script("gpu_acceptance")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path


def acceptance(tmp_path, *arguments, first_on_path=""):
    """Run the small version of the script, with another folder first on the path."""
    command = [ROOT / "scripts" / "gpu_acceptance.py", "--small", "--out", tmp_path / "out", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{first_on_path}{os.pathsep}{os.environ['PYTHONPATH']}")
        ended = run_command(*command, timeout=1600)
    return ended, json.loads((tmp_path / "out" / "acceptance.json").read_text())


def planned(script, folder, **codes):
    """One stage per name, whose process runs some Python code with a `bench`."""
    begin = f"import sys, time; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import gpu_acceptance; "
    begin += f"from pathlib import Path; folder = Path({str(folder)!r}); "

    def source(name, code):
        return begin + f"bench = gpu_acceptance.Bench(folder, {name!r}, True, 9, {{}}); {code}"

    return [script.Planned(name, 1, [sys.executable, "-c", source(name, code)]) for name, code in codes.items()]


def test_a_stage_that_fails_or_overruns_does_not_stop_the_others(script, folder):
    stages = planned(
        script, folder,
        silent="sys.exit(7)",
        slow="bench.record('half', 'done', number=1); time.sleep(600)",
        fine="bench.record('speed', '3', goal='4', is_met=False, number=2); bench.write('passed', '')",
    )  # fmt: skip
    began = time.monotonic()
    content = script.accept(stages, folder, 24, FACTS)
    assert time.monotonic() - began < 60
    assert json.loads((folder / "acceptance.json").read_text()) == content
    silent, slow, fine = content["stages"]
    assert (silent["status"], silent["why"]) == ("failed", "ended without a result")
    assert slow["status"] == "overran" and slow["why"].startswith("killed after its ")
    assert slow["figures"] == {"number": 1}, "its results so far are kept"
    assert (fine["status"], fine["figures"]) == ("passed", {"number": 2})
    table, page = script.terminal_table(content), script.markdown(content)
    assert "OVERRAN" in table and "[goal 4: below goal]" in table
    assert "| speed | 3 | 4: below goal |" in page and "say nothing about a GPU" in page


def test_unused_time_of_a_stage_goes_to_later_ones(script):
    stages = [script.Planned("first", 1, []), script.Planned("second", 3, []), script.Planned("last", 4, [])]
    assert script.limit_of(stages, 125) == 15 + 80 / 8
    assert script.limit_of(stages[1:], 100) == 15 + 70 * 3 / 7
    assert script.limit_of(stages[2:], 60) == 60
    assert script.limit_of(stages, 24) == 4 + 12 / 8
    assert script.limit_of(stages, -3) == 1


def test_child_processes_of_a_stage_are_killed_with_it(script, folder):
    code = "import subprocess; child = subprocess.Popen(['sleep', '600']); bench.record('child', '', pid=child.pid); "
    content = script.accept(planned(script, folder, parent=code + "time.sleep(600)"), folder, 8, FACTS)
    pid = content["stages"][0]["figures"]["pid"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until it is reaped
            os.kill(pid, 0)
            if "\nState:\tZ" in (Path("/proc") / str(pid) / "status").read_text():
                raise ProcessLookupError
            time.sleep(0.1)


def test_an_overrun_exits_with_status_1(tmp_path):
    ended, content = acceptance(tmp_path, "--stage", "environment", "--seconds", "1")
    assert ended.returncode == 1 and "not accepted: environment" in ended.stderr
    assert [stage["status"] for stage in content["stages"]] == ["overran"]


def test_a_failed_stage_exits_with_status_1(tmp_path):
    (tmp_path / "first" / "pytest").mkdir(parents=True)
    (tmp_path / "first" / "pytest" / "__init__.py").touch()
    code = "print('tests/a.py::test_one PASSED [ 50%]\\ntests/a.py::test_two FAILED [100%]'); raise SystemExit(1)"
    (tmp_path / "first" / "pytest" / "__main__.py").write_text(code)
    ended, content = acceptance(tmp_path, "--stage", "tests", first_on_path=tmp_path / "first")
    assert ended.returncode == 1 and "not accepted: tests" in ended.stderr
    (stage,) = content["stages"]
    assert (stage["status"], stage["why"]) == ("failed", "test_two: see the log")
    assert stage["figures"]["counts"] == {"passed": 1, "failed": 1}


def test_a_zero_nonfinite_or_deviating_gradient_is_wrong(script):
    expected = {"w": torch.tensor([3.0, 4.0]).double()}

    def fault(*values):
        return script.difference("w", {"w": torch.tensor(values).double()}, expected, 0.05)

    assert fault(3.0, 4.0) is None and fault(3.1, 4.1) is None
    assert fault(0.0, 0.0) == "w is exactly zero"
    assert fault(math.nan, 4.0) == "w is not finite"
    assert fault(3.0, 4.5) == "w is off by 0.1, cosine 0.99846"
    assert fault(6.0, 8.0).startswith("w is off by 1,")


@pytest.mark.parametrize(("ours", "is_met"), [(130.0, True), (110.0, False)])
def test_cucafera_is_compared_with_the_fastest_peer(script, folder, ours, is_met):
    bench = script.Bench(folder, "benchmark", False, 9, {})
    speeds = {"cucafera, compiled": ours, "bare loop, compiled": 900.0, "slow": 50.0, "fast (not masked)": 100.0}
    script.compare(bench, "documents", speeds)
    (row,) = bench.rows
    assert (row["value"], row["goal"], row["is_met"]) == (f"{ours / 100:.2f} (fast (not masked))", "1.2", is_met)


def test_on_a_gpu_it_runs_the_245m_model_with_its_batch(script, folder):
    bench = script.Bench(folder, "training", False, 9, {})
    config = composed_config(script.product_command(bench, "training", 12, "trainer.profile=true")[3:])
    assert (config.total_steps, config.horizon_steps, config.windows_per_step) == (12, 12, 256)
    assert config.data.document_masking and config.trainer.accelerator == "cuda" and config.trainer.compile is True
    assert parameter_count(config.model) == parameter_count(CUCAFERA)
    narrow = script.small_depth(bench, True).model
    assert narrow.hidden_size // narrow.num_attention_heads == 96

    hardware = {
        "precision": "bf16", "residual_precision": "bf16", "compile": True, "activation_checkpointing": False,
        "micro_batch_windows": 16,
    }  # fmt: skip
    script.memory_against_formula(bench, config, hardware, 50.0)
    assert bench.figures["peak_memory_gib"] == 50 and 20 < bench.figures["computed_memory_gib"] < 70


@pytest.mark.slow
def test_the_small_version_runs_on_a_cpu_without_datasets(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "datasets.py").write_text("raise AssertionError('no stage needs it')")
    stages = ("environment", "gradients", "training", "checkpoint")  # the others start many processes
    chosen = [word for stage in stages for word in ("--stage", stage)]
    ended, content = acceptance(tmp_path, *chosen, "--seconds", "1500", first_on_path=tmp_path / "first")
    log = (tmp_path / "out" / "acceptance.log").read_text()
    assert ended.returncode == 0, ended.stderr + log
    assert [(stage["name"], stage["status"]) for stage in content["stages"]] == [(name, "passed") for name in stages]
    figures = {stage["name"]: stage["figures"] for stage in content["stages"]}
    assert figures["environment"]["matrix_flops"] > 1e9
    for precision, tolerance in (("bf16", 0.05), ("fp32", 1e-3)):
        for windows in ("documents by dense", "full windows"):
            errors = figures["gradients"][f"{precision}, {windows}"]
            assert len(errors) == 20 and 0 < max(errors.values()) < tolerance
    assert figures["training"]["tokens_per_second"] > 0 and figures["training"]["mfu"]["of_matrix_products"] > 0
    assert figures["training"]["loss"][0] > figures["training"]["loss"][-1]
    assert figures["checkpoint"]["checkpoint_bytes"] > 1e6
    page = (tmp_path / "out" / "acceptance.md").read_text()
    assert "| tokens per second |" in page and "matrix products" in page.split("```text")[1]
    assert "On a CPU" in ended.stdout and not (tmp_path / "out" / "work").exists()
