"""Checks of the start of the command line: how OpenMP's threads wait for each other."""

import os
import re
import signal
import subprocess
import sys

import pytest
from target import COMMAND, ROOT

import sgalign_command
from sgalign.commands import doctor


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the settings of this process, but with the given ones."""
    environment = {name: value for name, value in os.environ.items() if name not in sgalign_command.WAIT_SETTINGS}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    ("start", "given", "expected"),
    [
        (["-c", COMMAND], {}, sgalign_command.SPINS),
        (["-m", "sgalign"], {}, sgalign_command.SPINS),
        (["-c", COMMAND], {"GOMP_SPINCOUNT": "7"}, "7"),
        (["-m", "sgalign"], {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
    ],
)
def test_threads_of_the_command_line_soon_sleep_unless_the_user_decides(start, given, expected):
    if not any("libgomp" in runtime for runtime in doctor.openmp_runtimes() or []):
        pytest.skip("torch does not use GNU's OpenMP here")
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run([*start, "--version"], **given).stderr)
    assert counts[-1] == expected  # `python -m` loads torch twice


def test_names_of_files_that_are_no_text_can_be_printed(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    run(["-c", COMMAND, "make-dataset", str(folder), "--sizes", "1", "1", "1", "--no-images"])
    assert r"caf\udce9" in run(["-c", COMMAND, "check", str(folder), "--json", str(tmp_path / "report.json")]).stdout


def test_ctrl_c_after_the_command_ends_the_process_without_a_traceback():
    interrupt = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(["-c", f"{interrupt}; {COMMAND}", "--version"])
    assert error.value.returncode == -signal.SIGINT and "Traceback" not in error.value.stderr
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as a shell does for commands with &
    run(["-c", f"{ignore}; {interrupt}; {COMMAND}", "--version"])


def test_lightnings_end_after_ctrl_c_has_the_code_of_ctrl_c(monkeypatch, capsys):
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("sgalign.commands.main.main", interrupted)
    assert sgalign_command.run() == 130
    assert capsys.readouterr().err == "sgalign: interrupted\n"
    monkeypatch.setattr("sgalign.commands.main.main", lambda: sys.exit(2))
    with pytest.raises(SystemExit, match="2"):
        sgalign_command.run()


def test_a_program_that_runs_the_module_does_not_start_again(tmp_path):
    script = tmp_path / "script.py"
    module = 'runpy.run_module("sgalign", run_name="__main__", alter_sys=True)'
    script.write_text(f'import runpy, sys\nprint("started")\nsys.argv = ["sgalign", "--version"]\n{module}\n')
    assert run([str(script)]).stdout.count("started") == 1


def test_importing_the_package_changes_nothing():
    run(["-c", "import os; before = dict(os.environ); import sgalign; assert os.environ == before"])


def test_the_entry_point_loads_no_torch():
    run(["-c", "import sys; import sgalign_command; assert 'torch' not in sys.modules"])


@pytest.mark.parametrize("command", ["view", "check", "make_dataset"])
def test_commands_without_a_model_load_none_of_the_libraries_that_take_seconds(command):
    pytest.importorskip("h5py")
    slow = {"lightning", "torchmetrics", "torchvision", "transformers", "scipy", "matplotlib"}
    run(["-c", f"import sys; import sgalign.commands.{command}; assert not {slow} & set(sys.modules)"])


def test_doctor_says_how_threads_wait(monkeypatch):
    for name in sgalign_command.WAIT_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert "spin for milliseconds" in doctor.waiting()
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    assert "GOMP_SPINCOUNT=0" in doctor.waiting()
