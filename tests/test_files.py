"""Files that appear whole or not at all, despite errors, full disks and places that cannot be written."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")
import h5py  # noqa: E402

from sgalign.data.features import FIELDS, FeatureCache  # noqa: E402
from sgalign.files import (  # noqa: E402
    check_writable,
    folder_locked,
    folder_written_whole,
    hdf5_written_whole,
    read_json,
    read_tensors,
    uninterrupted,
    write_json,
    written_whole,
)

LIMIT = 1 << 20


@pytest.fixture
def full_disk():
    """Limit the size of files, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with written_whole(path) as partial:
            partial.write_text(content)
            assert path.exists() == (content == "second")
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_json(Path("/dev/full"), {})


def test_names_of_files_that_are_no_text_are_escaped_in_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "file.json", {"folder": name, "é": 1})
    assert json.loads((tmp_path / "file.json").read_bytes()) == {"folder": name, "é": 1}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in /dev/shm")
def test_files_in_shared_memory_are_written_whole_too():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "new", "file.txt")
        with written_whole(path) as partial:
            assert partial != path and partial.parent.is_dir()
            partial.write_text("whole")
        assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_errors_and_interrupts_leave_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("second")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), written_whole(path) as partial:
            partial.write_text("third")
            raise error
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from sgalign.files import folder_written_whole, written_whole

with written_whole(sys.argv[1]) as partial, folder_written_whole(Path(sys.argv[2])) as folder:
    for path in (partial, folder / "inside"):
        path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_deletes_what_a_killed_process_has_left(tmp_path):
    path, folder = tmp_path / "file.txt", tmp_path / "folder"
    subprocess.run([sys.executable, "-c", KILLED, path, folder])
    left = {name.rpartition(".")[0].rpartition(".")[0] for name in os.listdir(tmp_path)}
    assert left == {"file.txt", "folder"} and len(os.listdir(tmp_path)) == 2
    write_json(path, "whole")
    with folder_written_whole(folder) as partial:
        (partial / "inside").write_text("whole")
    assert sorted(tmp_path.iterdir()) == [path, folder] and (folder / "inside").read_text() == "whole"


def test_a_writer_leaves_the_partial_file_of_a_living_writer_and_other_files_alone(tmp_path):
    path = tmp_path / "file.txt"
    others = [tmp_path / name for name in ("file.txt.partial", "file.txt.old.partial", "file.txt.1.0123abcd.partial")]
    for other in others:
        other.touch()
    with written_whole(path) as first:
        first.write_text("first")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_without_locks_of_the_file_system_files_are_written_and_leftovers_stay(tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    left = tmp_path / "file.json.0123abcd.partial"
    left.touch()
    write_json(tmp_path / "file.json", "whole")
    assert read_json(tmp_path / "file.json") == "whole" and sorted(os.listdir(tmp_path)) == ["file.json", left.name]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_of_a_full_disk_names_the_file(folder, tmp_path, full_disk):
    path = tmp_path / "out"
    with pytest.raises(OSError, match=r"File too large: '.*/out'$"):
        with (folder_written_whole if folder else written_whole)(path) as partial:
            (partial / "inside" if folder else partial).write_bytes(bytes(2 * LIMIT))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OSError, match=r"not empty: '.*/out'$"), folder_written_whole(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_files_in_shared_memory_appear_when_they_are_complete():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "new" / "file.txt"
        with written_whole(path) as partial:
            partial.write_text("whole")
            assert not path.exists()
        assert path.read_text() == "whole"


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target.json")
    for content in ("first", "second"):
        write_json(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "target.json") == content


def test_writing_to_a_pipe_keeps_the_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b'"through"\n' and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_json_that_does_not_fit_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "a.json"
    write_json(path, "before")
    with pytest.raises(OSError, match="too large"):
        write_json(path, "x" * (2 * LIMIT))
    assert read_json(path) == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [LIMIT // 50, 3 * LIMIT])  # bytes of each of 100 data sets
def test_hdf5_that_does_not_fit_leaves_the_old_file(size, tmp_path, full_disk):
    path = tmp_path / "a.h5"
    with hdf5_written_whole(path) as file:
        file["x"] = np.zeros(10)
    before = path.read_bytes()
    with pytest.raises(OSError, match="too large"), hdf5_written_whole(path) as file:
        for number in range(100):
            file[str(number)] = np.zeros(size, np.uint8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("when", ["opening", "closing"])
def test_an_interruption_waits_until_hdf5_is_ready(when, tmp_path, monkeypatch):
    class Interrupted(h5py.File):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)
            self.finish("opening")

        def close(self):
            super().close()
            self.finish("closing")

        def finish(self, what):
            if what == when:
                signal.raise_signal(signal.SIGINT)
                finished.append(what)

    finished, opened = [], []
    monkeypatch.setattr(h5py, "File", Interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), hdf5_written_whole(tmp_path / "a.h5") as file:
        file["x"] = 1
    assert finished == [when] and not opened[0] and signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir())


def test_all_signals_of_the_block_arrive_and_the_handlers_return():
    received = []
    before = {number: signal.signal(number, lambda *got: received.append(got[0])) for number in (2, 15)}
    handlers = signal.getsignal(2), signal.getsignal(15)
    with uninterrupted():
        for number in (15, 2, 15):
            signal.raise_signal(number)
        assert not received
    assert received == [15, 2, 15] and (signal.getsignal(2), signal.getsignal(15)) == handlers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_places_that_cannot_be_written_are_known_at_once(tmp_path):
    with pytest.raises(IsADirectoryError, match="must be a file, but is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "below.json")


def test_error_of_a_missing_checkpoint_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt: no such checkpoint"):
        read_tensors(tmp_path / "none.ckpt", "checkpoint")


def test_error_of_a_checkpoint_that_is_cut_short_names_it(tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="cut.ckpt: must be a checkpoint, but is not one or is cut short"):
        read_tensors(tmp_path / "cut.ckpt", "checkpoint")


@pytest.mark.parametrize("happens", ["is cut short", "is replaced"])
def test_features_of_a_file_that_changes_while_it_is_open_are_whole_or_refused(happens, tmp_path):
    path = tmp_path / "features_00000.h5"
    with hdf5_written_whole(path) as file:
        file.attrs.update({"weights": "w", "dtype": "float32"})
        for number in range(2):
            for field, rows in zip(FIELDS, (20, 20, 20, 380)):
                file[f"{number}/{field}"] = np.full((rows, 400), number, np.float32)
    cache = FeatureCache(tmp_path)
    assert float(cache["0"]["union"].sum()) == 0
    if happens == "is replaced":
        path.unlink()
        path.write_text("another")
        assert all(float(values.mean()) == 1 for values in cache["1"].values())
    else:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ValueError, match=r"features_00000.h5, image '1': is damaged"):
            cache["1"]


ODD_TENSORS = {
    "sparse": torch.Tensor.to_sparse,
    "far larger than stored": lambda x: x.expand(1 << 26, 2),
    "without numbers": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_tensors_without_numbers_of_their_own_are_refused(odd, tmp_path):
    torch.save({"a": [{"b": (ODD_TENSORS[odd](torch.ones(1, 2)),)}]}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt: must be a checkpoint, but .*it has a tensor"):
        read_tensors(tmp_path / "x.ckpt", "checkpoint")


def test_a_small_expanded_tensor_is_read(tmp_path):
    torch.save(torch.ones(1).expand(9), tmp_path / "x.ckpt")
    assert read_tensors(tmp_path / "x.ckpt", "checkpoint").tolist() == [1.0] * 9


def test_a_new_version_of_a_file_has_the_permissions_of_the_old_one(tmp_path):
    write_json(tmp_path / "x.json", 1)
    (tmp_path / "x.json").chmod(0o600)
    write_json(tmp_path / "x.json", 2)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600


def test_a_file_with_the_longest_name_is_written_and_what_a_kill_left_of_it_deleted(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")
    left = tmp_path / f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.01234567.partial"
    left.touch()
    write_json(path, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path):
    with folder_locked(tmp_path):
        with pytest.raises(OSError, match="another process is writing to this folder"), folder_locked(tmp_path):
            pass
    with folder_locked(tmp_path):
        pass


def test_a_key_that_occurs_twice_among_many_is_found_at_once(tmp_path):
    keys = [*(f'"{number}": 0' for number in range(100_000)), '"99999": 1']
    (tmp_path / "x.json").write_text("{" + ", ".join(keys) + "}")
    start = time.process_time()
    with pytest.raises(ValueError, match="the key '99999' occurs twice"):
        read_json(tmp_path / "x.json")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_number_in_a_checkpoint_is_found_by_its_checksum(mapped, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.full((1000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    place = content.find(struct.pack("<f", 1.5) * 10)
    content[place + 403] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt: must be a checkpoint, but its part 'x/data/0' is damaged"):
        read_tensors(path, "checkpoint", mapped=mapped)


def test_a_link_in_a_loop_is_named_and_stays(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (written_whole, folder_written_whole):
        for path in (tmp_path / "a", tmp_path / "a" / "x"):
            with pytest.raises(OSError, match=str(tmp_path / "a")), write(path):
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"] and (tmp_path / "a").is_symlink()
