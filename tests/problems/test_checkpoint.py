"""Checkpoints: what is read equals what was written, and each kind of damage gets its sentence."""

import json
import pickle
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.problems.checkpoint import Checkpoint, CheckpointError, open_safetensors

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def matrix(dtype=np.float32, seed=0, shape=(3, 4)):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_raw(path, header, data=b"", length=None):
    """Write a safetensors file byte by byte, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two shards, a float16 and a bfloat16 one."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": matrix(np.float16, 1), "b": matrix(np.float16, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": matrix(ml_dtypes.bfloat16, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    return tmp_path


def write_index(directory, shards):
    weight_map = {name: f"model-{i:05}-of-00002.safetensors" for name, i in shards.items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_upcast_exactly(tmp_path, dtype):
    stored = matrix(dtype)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    assert (files.names(), files.shape("x"), files.stored_dtype("x")) == (["x"], (3, 4), np.dtype(dtype).name)
    for wanted in (None, dtype, np.float64):
        read = files.tensor("x", dtype=wanted)
        assert np.array_equal(read.astype(np.float64), stored.astype(np.float64))
    assert files.tensor("x", dtype=None).dtype == (np.float64 if dtype is np.float64 else np.float32)


def test_a_dtype_that_would_round_is_refused(tmp_path):
    save_file({"x": matrix(np.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'x' in .*x\.safetensors is stored as float64.*dtype=float64"):
        open_safetensors(tmp_path / "x.safetensors").tensor("x")


def test_bfloat16_and_float16_are_not_confused(tmp_path):
    save_file({"x": np.ones(3, ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not hold exactly"):
        open_safetensors(tmp_path / "x.safetensors").tensor("x", dtype=np.float16)


def test_shards_are_one_checkpoint(sharded):
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names() == ["a", "b", "c"]
    assert [checkpoint.stored_dtype(n) for n in "abc"] == ["float16", "float16", "bfloat16"]
    assert np.array_equal(checkpoint.tensor("b"), matrix(np.float16, 2).astype(np.float32))
    assert np.array_equal(checkpoint.tensor("c"), matrix(ml_dtypes.bfloat16, 3).astype(np.float32))
    assert "c" in checkpoint
    assert "d" not in checkpoint


def test_an_index_alone_opens_its_shards(sharded):
    files = open_safetensors(sharded / "model.safetensors.index.json")
    assert np.array_equal(files.tensor("a"), matrix(np.float16, 1).astype(np.float32))


def test_the_single_file_goes_before_an_index(sharded):
    save_file({"alone": matrix()}, sharded / "model.safetensors")
    assert Checkpoint(sharded).names() == ["alone"]


def test_one_tensor_does_not_cost_the_memory_of_the_file(tmp_path):
    large = np.zeros((1024, 2048), np.float32)  # 8 MiB
    save_file({"large": large, "small": matrix()}, tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        small = open_safetensors(tmp_path / "x.safetensors").tensor("small")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(small, matrix())
    assert peak < 1 << 20


def test_rows_are_those_of_the_tensor_and_nothing_else_is_read(tmp_path):
    """The other axes flattened; a file that has been cut short in the meantime is refused."""
    x = np.arange(120, dtype=np.float16).reshape(5, 2, 3, 4)
    save_file({"a": matrix(), "x": x, "z": matrix()}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    assert np.array_equal(files.rows("x", 1, 4), x[1:4].reshape(3, -1))
    assert files.rows("x", 4, 9).shape == (1, 24)
    assert files.raw("x", 0, 5).tobytes() == x.tobytes()
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cut short"):
        files.rows("x", 3, 5)


def test_it_can_be_sent_to_another_process(sharded):
    checkpoint = pickle.loads(pickle.dumps(Checkpoint(sharded)))  # noqa: S301 - made in the same line
    assert np.array_equal(checkpoint.tensor("a"), matrix(np.float16, 1).astype(np.float32))


def test_an_empty_tensor_and_a_scalar_are_tensors(tmp_path):
    save_file({"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5, np.float32)}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    assert files.tensor("empty").shape == (0, 3)
    assert float(files.tensor("scalar")) == 2.5


# -- tensors that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_are_located(tmp_path, dtype, bad):
    x = matrix(dtype)
    x[1, 2] = bad
    save_file({"ok": matrix(), "x": x}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    assert files.tensor("ok").shape == (3, 4)
    with pytest.raises(CheckpointError, match=r"'x' in .*x\.safetensors has 1 entries .* first at \[1, 2\]"):
        files.tensor("x", dtype=None)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_integers_are_no_weights(tmp_path, dtype):
    save_file({"x": np.ones(3, dtype)}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    assert files.stored_dtype("x") == np.dtype(dtype).name
    with pytest.raises(CheckpointError, match=r"'x' in .*x\.safetensors is stored as .*only float16"):
        files.tensor("x")


def test_an_unknown_tensor_gets_the_nearest_names(tmp_path):
    save_file({"model.norm.weight": matrix()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds no tensor 'norm\.weight'.*'model\.norm\.weight'"):
        open_safetensors(tmp_path / "x.safetensors").tensor("norm.weight")


def test_expect_compares_shape_and_dtype(tmp_path):
    save_file({"x": matrix(), "i": np.ones(3, np.int32)}, tmp_path / "x.safetensors")
    files = open_safetensors(tmp_path / "x.safetensors")
    files.expect("x", (3, 4), "a test")
    with pytest.raises(CheckpointError, match=r"'x' in .*x\.safetensors has shape \(3, 4\), a test asks for \(4, 3\)"):
        files.expect("x", (4, 3), "a test")
    with pytest.raises(CheckpointError, match=r"'i' .*int32"):
        files.expect("i", (3,), "a test")


# -- files that cannot be read -------------------------------------------------------------------------------------

DAMAGED = {
    "empty file": (b"", "truncated or no safetensors file"),
    "seven bytes": (b"1234567", "truncated or no safetensors file"),
    "absurd header length": ((2**62).to_bytes(8, "little") + b"{}", f"header of {2**62} bytes"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes, the file has 10"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "not JSON": ((5).to_bytes(8, "little") + b"{oops", "not JSON"),
    "not UTF-8": ((4).to_bytes(8, "little") + b"\xff\xfe{}", "not JSON"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "JSON list"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    content, sentence = DAMAGED[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is .*{sentence}"):
        open_safetensors(path)


LIES = {
    "ends beyond the file": ({"x": entry(0, 48, [3, 4])}, 40, "'x' ends at byte 48 of the data, the file has 40"),
    "overlap": ({"x": entry(0, 16, [4]), "y": entry(8, 24, [4])}, 24, "'x' and 'y' overlap"),
    "gap": ({"x": entry(0, 16, [4]), "y": entry(20, 36, [4])}, 36, "bytes 16 to 20 before tensor 'y'"),
    "bytes left over": ({"x": entry(0, 16, [4])}, 20, "end at byte 16 of the data, the file has 20"),
    "shape against offsets": ({"x": entry(0, 16, [5])}, 16, r"'x' of shape \(5,\) in float32 needs 20 bytes"),
    "backwards": ({"x": entry(16, 0, [4])}, 16, "'x' .*bytes 16 to 0"),
    "negative": ({"x": entry(-16, 0, [4])}, 16, "describes tensor 'x'"),
    "negative shape": ({"x": entry(0, 16, [-2, -2])}, 16, "describes tensor 'x'"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, 16, "describes tensor 'x'"),
    "not an object": ({"x": 3}, 0, "describes tensor 'x'"),
    "three offsets": ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, 16, "describes tensor 'x'"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_header_is_found_out(tmp_path, name):
    header, size, sentence = LIES[name]
    path = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is .*{sentence}"):
        open_safetensors(path)


def test_a_name_that_stands_twice_is_found_out(tmp_path):
    one = json.dumps(entry(0, 16, [4]))
    path = write_raw(tmp_path / "x.safetensors", f'{{"x": {one}, "x": {one}}}'.encode(), bytes(16))
    with pytest.raises(CheckpointError, match="'x' stands in it twice"):
        open_safetensors(path)


def test_a_dtype_of_no_format_is_refused_when_it_is_read(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"x": entry(0, 16, [4], dtype="F31")}, bytes(16))
    with pytest.raises(CheckpointError, match=r"'x' in .*stored as F31"):
        open_safetensors(path).tensor("x")


def test_what_the_library_refuses_becomes_a_sentence(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"x": entry(0, 16, [4]), "y": entry(16, 16, [0], "F31")}, bytes(16))
    with pytest.raises(CheckpointError, match=r"'x' in .*x\.safetensors cannot be read"):
        open_safetensors(path).tensor("x")


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": matrix(), "y": matrix()}, path)
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated"):
            open_safetensors(path)


# -- directories ---------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_a_tensor(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing; .*'a' and 1 other"):
        Checkpoint(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded):
    write_index(sharded, {"a": 1, "c": 1})
    with pytest.raises(CheckpointError, match=r"'c' into .*00001-of-00002\.safetensors, which does not hold it"):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_an_index_without_a_map_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors\.index\.json (has no 'weight_map'|is not JSON|holds a)"
    ):
        Checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "", 3])
def test_a_shard_elsewhere_is_refused(sharded, shard):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        Checkpoint(sharded)


def test_no_config(tmp_path):
    save_file({"x": matrix()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_not_an_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a JSON list)"):
        Checkpoint(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights to read"):
        Checkpoint(tmp_path)


def test_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="index that names the shards is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    for open_it in (lambda: Checkpoint(tmp_path), lambda: open_safetensors(tmp_path / name)):
        with pytest.raises(CheckpointError, match=r"pickled weights") as caught:
            open_it()
        assert f"torch.load({name!r}, weights_only=True)" in str(caught.value)
        assert "safetensors.torch.save_file" in str(caught.value)


@pytest.mark.torch
def test_the_way_to_convert_works(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"x": shared, "tied": shared}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path)
    snippet = [line.strip() for line in str(caught.value).splitlines()[1:]]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(snippet), {})  # noqa: S102 - the two lines that the message prints
    assert np.array_equal(open_safetensors(tmp_path).tensor("x"), np.arange(6.0).reshape(2, 3))


def test_a_file_or_nothing_in_the_place_of_a_directory(tmp_path):
    save_file({"x": matrix()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file; pass the directory"):
        Checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not exist; pass the directory"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist"):
        open_safetensors(tmp_path / "nothing.safetensors")
