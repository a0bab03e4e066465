"""Commands in forked processes: their arguments, variables, output, exit codes and ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from port_kit.testing.forkserver import run_forked

SCRIPT = """
import os, sys
import vllm_omni
print(sys.argv[1:], os.environ["SOME"], os.getcwd(), __name__)
print("no", file=sys.stderr)
sys.exit(3)
"""


def test_a_script_runs_as_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for _ in range(2):
        done = run_forked([sys.executable, "script.py", "-a", "b"], cwd=tmp_path, timeout=120, SOME="x")
        assert (done.returncode, done.stdout, done.stderr) == (3, f"['-a', 'b'] x {tmp_path} __main__\n", "no\n")


def test_a_module_is_found_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text("import sys; print(sys.argv[1:]); import nothing_like_this")
    done = run_forked([sys.executable, "-m", "some_module", "a"], cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and done.stdout == "['a']\n"
    assert "ModuleNotFoundError: No module named 'nothing_like_this'" in done.stderr


def test_workers_are_forked_from_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import multiprocessing, os\n"
        "def work(place):\n"
        "    open(place, 'w').write(os.environ['SOME'])\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn', force=True)\n"
        "    worker = multiprocessing.Process(target=work, args=('found',))\n"
        "    worker.start()\n"
        "    worker.join()\n"
        "    print(multiprocessing.get_start_method(), worker.exitcode)\n"
    )
    done = run_forked([sys.executable, "script.py"], cwd=tmp_path, timeout=120, SOME="x")
    assert (done.stdout, (tmp_path / "found").read_text()) == ("forkserver 0\n", "x"), done.stderr


def test_what_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked([sys.executable, "script.py"], cwd=tmp_path, timeout=3)
    time.sleep(0.5)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_variables_that_libraries_have_read_are_refused() -> None:
    with pytest.raises(ValueError, match="HF_HOME"):
        run_forked([sys.executable, "-m", "this"], timeout=10, HF_HOME="/nowhere")
