"""Tests of the claims with which processes share the runs of a study."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("lightning")
from sgalign.studies import claims  # noqa: E402


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)


def of_another_machine(folder, number=1, age=0.0):
    """Write a claim of another machine, whose last update is `age` seconds old."""
    path = folder / f"claim.{number}"
    path.write_text(json.dumps({"host": "far", "machine": "far boot", "pid": "1", "started": "1", "job": "7"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_run_is_claimed_once_and_free_after_its_release(tmp_path):
    claim = claims.take(tmp_path)
    assert claim is not None and claims.take(tmp_path) is None
    assert claims.holder(tmp_path).startswith(f"process {os.getpid()} on ")
    claim.release()
    assert claims.holder(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_claim_is_kept_alive(tmp_path):
    claim = claims.take(tmp_path)
    os.utime(claim.path, (0, 0))
    time.sleep(0.5)
    assert not claims.expired(claim.path)
    claim.release()


def test_a_claim_of_another_machine_expires_with_its_age(tmp_path):
    of_another_machine(tmp_path, age=claims.EXPIRY - 20)
    assert claims.take(tmp_path) is None and claims.holder(tmp_path) == "process 1 on far"
    of_another_machine(tmp_path, age=claims.EXPIRY + 20)
    claim = claims.take(tmp_path)
    assert claim is not None and [path.name for path in tmp_path.iterdir()] == ["claim.2"]
    claim.release()


def test_a_claim_of_an_ended_process_of_this_machine_expires_at_once(tmp_path):
    program = "import os, sys; from pathlib import Path; from sgalign.studies import claims\n"
    program += "claims.take(Path(sys.argv[1])); os._exit(1)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert (tmp_path / "claim.1").exists() and claims.holder(tmp_path) is None
    claims.take(tmp_path).release()


def test_a_claim_of_a_living_process_of_this_machine_does_not_expire_if_the_clock_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 60.0)
    claim = claims.take(tmp_path)
    for days in (-3, 3):
        os.utime(claim.path, (time.time() + days * 86400,) * 2)
        assert claims.holder(tmp_path).startswith(f"process {os.getpid()} on ") and claims.take(tmp_path) is None
    claim.release()


def test_a_claim_of_another_machine_with_a_time_stamp_in_the_future_has_expired(tmp_path):
    """The clock of the file system was set back after the machine had ended."""
    of_another_machine(tmp_path, age=-86400)
    assert claims.holder(tmp_path) is None
    claims.take(tmp_path).release()


def test_looking_at_claims_leaves_no_file(tmp_path, monkeypatch):
    """A file without a name needs no deletion, so a kill cannot leave it."""
    of_another_machine(tmp_path)
    monkeypatch.setattr(os, "unlink", lambda *args, **options: pytest.fail("a file had a name"))
    assert not claims.expired(tmp_path / "claim.1") and os.listdir(tmp_path) == ["claim.1"]


def test_a_process_that_has_lost_its_claim_ends(tmp_path):
    program = "import sys, time; from pathlib import Path; from sgalign.studies import claims\n"
    program += "claims.BEAT = 0.05; claims.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    of_another_machine(tmp_path, number=2)
    assert process.wait(timeout=30) == claims.LOST


def test_only_one_of_many_processes_takes_over_an_expired_claim(tmp_path):
    program = "import sys; from pathlib import Path; from sgalign.studies import claims; sys.stdin.readline()\n"
    program += "print(claims.take(Path(sys.argv[1])) is not None, flush=True); sys.stdin.readline()"
    of_another_machine(tmp_path, number=7, age=claims.EXPIRY + 20)
    command = [sys.executable, "-c", program, str(tmp_path)]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in others:
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.stdout.readline().strip() for process in others) == ["False", "False", "True"]
    for process in others:
        process.communicate("\n")


def test_an_unreadable_claim_expires_with_its_age(tmp_path):
    (tmp_path / "claim.1").write_text('{"host": "cu')
    assert claims.holder(tmp_path) == "process unknown on an unknown machine" and claims.take(tmp_path) is None
    os.utime(tmp_path / "claim.1", (0, 0))
    claims.take(tmp_path).release()


@pytest.mark.parametrize(("job", "follows"), [("7", True), ("8", False)])
def test_further_processes_of_a_job_follow_its_first_process(tmp_path, monkeypatch, job, follows):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    threading.Timer(0.1, of_another_machine, [tmp_path]).start()
    assert claims.follow(tmp_path) is follows


def test_further_processes_wait_only_until_a_claim_would_have_expired(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "EXPIRY", 0.1)
    assert not claims.follow(tmp_path)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"pid": "\\u0000"}', '{"pid": ["x"], "machine": 5}', "5", ""])
def test_a_damaged_claim_with_a_high_number_is_no_obstacle(content, tmp_path):
    """The number is of any size, so earlier claims must not be counted one by one."""
    path = tmp_path / f"claim.{10**15}"
    path.write_text(content)
    os.utime(path, (0, 0))
    (claim := claims.take(tmp_path)).release()
    assert claim.path.name == f"claim.{10**15 + 1}" and not list(tmp_path.iterdir())
