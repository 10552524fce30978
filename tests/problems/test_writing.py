"""Files that are there in full or not at all."""

import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from nla_llm.problems import _writing
from nla_llm.problems._writing import check_free, published, write_file, write_safetensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_written_file_is_what_the_library_reads(tmp_path, dtype):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).astype(dtype),
        "b.c": np.array(2.5, dtype),
        "none": np.zeros((0, 2), dtype),
    }
    name = np.dtype(dtype).name
    write_safetensors(
        tmp_path / "x.safetensors",
        {k: (v.shape, name) for k, v in arrays.items()},
        arrays.__getitem__,
        {"made": "here"},
    )
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(arrays)
    for key, values in arrays.items():
        assert read[key].dtype == values.dtype
        assert np.array_equal(read[key].astype(float), values.astype(float))


def test_nothing_is_left_of_what_goes_wrong(tmp_path, monkeypatch):
    """A full disk in mid-write: the system refuses more bytes."""

    def full(_number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"), published(tmp_path / "out") as aside:
            write_file(aside / "x", lambda stream: stream.write(b"half"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_when_writing_fails(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(IsADirectoryError), published(tmp_path / "out", force=True) as aside:
        aside.write_text("not a file")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_takes_the_place_of_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="--force"), published(tmp_path / "out"):
        pass
    with published(tmp_path / "out", force=True) as aside:
        (aside / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_free_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    check_free(tmp_path / "empty", force=False)
    with pytest.raises(FileExistsError, match="is a file"):
        check_free(tmp_path / "file", force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX systems")
def test_a_kill_leaves_no_half_and_the_next_run_tidies_up(tmp_path):
    """The process kills itself in the middle of a file."""
    program = f"""
        import os, pathlib
        from nla_llm.problems._writing import published, write_file
        def write(stream):
            stream.write(b"half"); stream.flush(); os.kill(os.getpid(), 9)
        with published(pathlib.Path({str(tmp_path / "out")!r})) as aside:
            write_file(aside / "x", write)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)  # noqa: S603 - our own text
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with published(tmp_path / "out") as aside:
        (aside / "x").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_shapes_are_what_was_announced(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x", {"a": ((2,), "float32")}, lambda _: np.zeros(3))
    assert list(tmp_path.iterdir()) == []
    assert _writing.STORAGE["bfloat16"][0].itemsize == 2
