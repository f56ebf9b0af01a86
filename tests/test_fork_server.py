"""A forked command starts, and ends, as an interpreter of its own does."""

import json
import os
import signal
import subprocess
import sys

import pytest

import cucafera
from tests.support import ROOT, Process, run_command

STATE = """
import json, os, signal, sys, threading
numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGPIPE]
print(json.dumps({
    "name": __name__, "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "input": sys.stdin.read(),
    "variables": sorted(set(os.environ) - {"LC_CTYPE"}), "of_test": os.environ["OF_TEST"],
    "signals": [str(signal.getsignal(number)) for number in numbers],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "threads": threading.active_count(),
    "streams": [(stream.isatty(), stream.encoding) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "buffering": sys.stdout.line_buffering,
}))
print("an error", file=sys.stderr)
"""
ENDS = {
    "pass": 0,
    "import sys; sys.exit(7)": 7,
    "import sys; sys.exit('why')": 1,
    "1 / 0": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "import os, signal; os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT,
    "import atexit; atexit.register(print, 'the end'); print('first', end=' ')": 0,
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('joined'))).start()": 0,
}


def test_it_has_the_state_of_an_interpreter(tmp_path, monkeypatch):
    (tmp_path / "state.py").write_text(STATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_TEST", "à")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forked = run_command("state.py", "a b", "--c", text="line\n")
    interpreter = [sys.executable, "state.py", "a b", "--c"]
    own = subprocess.run(interpreter, env=dict(os.environ), input="line\n", capture_output=True, text=True)
    assert json.loads(forked.stdout) == json.loads(own.stdout)
    assert (forked.returncode, forked.stderr) == (own.returncode, own.stderr) == (0, "an error\n")


@pytest.mark.parametrize("code", ENDS)
def test_it_ends_as_an_interpreter_does(tmp_path, code):
    (tmp_path / "end.py").write_text(code)
    forked = run_command("end.py", cwd=tmp_path)
    own = subprocess.run([sys.executable, "end.py"], cwd=tmp_path, capture_output=True, text=True)
    assert forked.returncode == own.returncode == ENDS[code]
    assert forked.stdout == own.stdout
    assert forked.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


def test_it_and_an_interpreter_import_the_checkout_of_the_tests(tmp_path):
    (tmp_path / "where.py").write_text("import cucafera; print(cucafera.__file__)")
    forked = run_command("where.py", cwd=tmp_path)
    own = subprocess.run([sys.executable, "where.py"], cwd=tmp_path, capture_output=True, text=True)
    assert forked.stdout.strip() == own.stdout.strip() == cucafera.__file__ == str(ROOT / "cucafera" / "__init__.py")


def test_signals_reach_its_process_group(tmp_path):
    (tmp_path / "sleep.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    processes = [Process(["sleep.py"], tmp_path, new_session=True) for _ in range(2)]
    for process in processes:
        assert process.outputs[0].readline() == "ready\n" and process.poll() is None
        assert os.getpgid(process.pid) == os.getsid(process.pid) == process.pid
    os.killpg(processes[0].pid, signal.SIGTERM)
    processes[1].kill()
    assert [process.wait(60) for process in processes] == [-signal.SIGTERM, -signal.SIGKILL]
    processes[0].send_signal(signal.SIGTERM)  # nothing, after its end


STARTER = """
import json, os, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
command = [sys.executable, *sys.argv[2:]]
others = {"input": "line\\n", "capture_output": True, "text": True, "cwd": sys.argv[1], "start_new_session": True}
ended = subprocess.run(command, env=os.environ | {"OF_TEST": "à"}, **others)
print(json.dumps([ended.returncode, ended.stdout, ended.stderr.splitlines()[-1:]]))
"""


@pytest.mark.parametrize("form", ["program", "module", "code"])
def test_what_it_starts_as_python_has_the_state_of_an_interpreter(tmp_path, form):
    (tmp_path / "start.py").write_text(STARTER)
    (tmp_path / "state.py").write_text(STATE)
    words = {"program": ["state.py"], "module": ["-m", "state"], "code": ["-c", STATE]}[form]
    arguments = ["start.py", str(tmp_path), *words, "a b"]
    forked = run_command(*arguments, cwd=tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    own = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(forked.stdout) == json.loads(own.stdout), forked.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives an orphan to another process than the first")
def test_what_it_starts_is_its_child_and_has_the_imports_and_its_rank(tmp_path):
    child = "import os, sys; print(os.getppid(), os.getpgrp(), os.getpid(), 'lightning' in sys.modules); sys.exit(3)"
    rank = "from lightning.pytorch.utilities import rank_zero_only; print(rank_zero_only.rank)"
    program = f"""
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
output, _ = process.communicate()
print(output.split() == [str(os.getpid()), str(os.getpgrp()), str(process.pid), "True"], process.returncode, flush=True)
subprocess.run([sys.executable, "-u", "-c", {rank!r}], env=os.environ | {{"LOCAL_RANK": "1"}})
print(subprocess.run([sys.executable, "-P", "-c", "import sys; print('lightning' in sys.modules)"]).returncode)
"""
    (tmp_path / "start.py").write_text(program)
    process = Process(["start.py"], tmp_path, new_session=True)
    output, _ = process.communicate()
    assert output.split() == ["True", "3", "1", "False", "0"]


def test_what_it_starts_imports_the_customization_that_was_added_to_its_path(tmp_path):
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text("print('customized')")
    program = """
import os, subprocess, sys
path = os.pathsep.join(["custom", os.environ["PYTHONPATH"]])
subprocess.run([sys.executable, "-c", ""], env=os.environ | {"PYTHONPATH": path})
"""
    (tmp_path / "start.py").write_text(program)
    assert run_command("start.py", cwd=tmp_path).stdout == "customized\n"
