"""Files appear whole or not at all: errors, disks that are full, folders that cannot be written to."""

import os
import resource

import numpy as np
import pytest

pytest.importorskip("h5py")
from sgalign.files import check_writable, hdf5_written_whole, read_json, read_tensors, write_json, written_whole

LIMIT = 1 << 20


@pytest.fixture
def full_disk():
    """Files do not grow beyond a limit, as on a full disk or with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with written_whole(path) as partial:
            partial.write_text(content)
            assert path.exists() == (content == "second")
        assert path.read_text() == content
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), written_whole(path) as partial:
            partial.write_text("third")
            raise error
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target.json")
    for content in ("first", "second"):
        write_json(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "target.json") == content
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b'"through"\n' and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_what_does_not_fit_leaves_what_was_there(tmp_path, full_disk):
    json_path, hdf5_path = tmp_path / "a.json", tmp_path / "a.h5"
    write_json(json_path, "before")
    with pytest.raises(OSError, match="too large"):
        write_json(json_path, "x" * (2 * LIMIT))
    assert read_json(json_path) == "before"
    with hdf5_written_whole(hdf5_path) as file:
        file["x"] = np.zeros(10)
    before = hdf5_path.read_bytes()
    for size in (LIMIT // 50, 3 * LIMIT):  # bytes of each of 100 data sets
        with pytest.raises(OSError, match="too large"), hdf5_written_whole(hdf5_path) as file:
            for number in range(100):
                file[str(number)] = np.zeros(size, np.uint8)
    assert hdf5_path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [hdf5_path, json_path]


def test_what_cannot_be_written_is_known_at_once(tmp_path):
    with pytest.raises(IsADirectoryError, match="must be a file, but is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "below.json")


def test_tensors_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt: no such checkpoint"):
        read_tensors(tmp_path / "none.ckpt", "checkpoint")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="cut.ckpt: must be a checkpoint, but is not one or is cut short"):
        read_tensors(tmp_path / "cut.ckpt", "checkpoint")
