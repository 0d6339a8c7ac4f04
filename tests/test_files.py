"""Files: what is written comes back, whole or not at all; of what others wrote, no header is believed."""

import io
import json
import os
import re
import stat
import struct
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same_bits, random_params, small_config

import lingrad_rs as lg
from lingrad_rs import _files

CONFIG = small_config(engine=lg.Polynomial())
CONFIG_KEY = "lingrad_rs.config"
X = np.arange(12, dtype=np.float32).reshape(3, 4)
DATA = X.tobytes()


def model(rng):
    return lg.Transformer(CONFIG, random_params(CONFIG, rng, np.float32))


def tensors(arrays, *, metadata=None, offsets=None, after=b""):
    """The bytes of a safetensors file of ``name: (dtype, shape, bytes)``, by the format's words alone."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in arrays.items():
        place = [len(data), len(data) + len(content)] if offsets is None else offsets
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += content
    return with_header(json.dumps(header).encode(), data + after)


def with_header(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def f32(x=X):
    return "F32", list(x.shape), x.astype("<f4").tobytes()


FLOAT8 = ("F8_E4M3", [5], bytes(5))


def test_every_shape_comes_back_as_it_was(dtype, tmp_path, rng):
    arrays = {
        "0-d": np.array(2.5, dtype),
        "number": dtype.type(-1.5),
        "empty": np.zeros((0, 3), dtype),
        "strided": rng.standard_normal((6, 8)).astype(dtype)[::-2, ::3],
        "fortran": rng.standard_normal((3, 4, 5)).astype(dtype).T,
        "read-only": np.broadcast_to(dtype.type(7), (2, 3)),
        "ünï/注意 \t\"'": np.ones(3, dtype),
        "": np.ones(1, dtype),
    }
    lg.save(tmp_path / "file", arrays)
    got = lg.load(tmp_path / "file")
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in arrays.items()}
    assert_same_bits(got, {name: np.asarray(x) for name, x in arrays.items()})
    # Another library reads the same, and would have written the same.
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "file"), got)
    arrays = {name: np.array(x, order="C") for name, x in arrays.items()}
    assert (tmp_path / "file").read_bytes() == safetensors.numpy.save(arrays)


def test_arrays_of_two_dtypes_and_a_model_are_written_as_another_library_would(tmp_path, rng):
    arrays = {"b": rng.standard_normal(3), "a": np.ones(3, np.float32), "c": np.ones((2, 2))}
    lg.save(tmp_path / "file", arrays)
    assert (tmp_path / "file").read_bytes() == safetensors.numpy.save(arrays)
    made = model(rng)
    lg.save(tmp_path / "model", made)
    with safetensors.safe_open(tmp_path / "model", "np") as file:
        metadata = file.metadata()
    assert (tmp_path / "model").read_bytes() == safetensors.numpy.save(made.params, metadata)


def test_what_another_library_wrote_is_read_in_every_dtype_of_numpy(tmp_path, rng):
    kinds = [np.float16, np.float32, np.float64, np.complex64, np.bool_, np.uint8, np.int16, np.uint32, np.int64]
    arrays = {np.dtype(kind).name: rng.integers(0, 2, (2, 3)).astype(kind) for kind in kinds}
    safetensors.numpy.save_file(arrays, tmp_path / "file", {"by": "another"})
    assert_same_bits(lg.load(tmp_path / "file"), arrays)


def test_bfloat16_is_widened_to_float32_to_the_bit(tmp_path):
    halves = np.arange(2**16, dtype="<u2")
    content = {"x": ("BF16", [256, 256], halves.tobytes()), "0-d": ("BF16", [], b"\xc0\x3f")}
    (tmp_path / "file").write_bytes(tensors(content))
    got = lg.load(tmp_path / "file")
    assert got["x"].dtype == got["0-d"].dtype == np.float32
    assert got["0-d"].shape == ()
    assert got["0-d"] == 1.5
    # One bit of sign, eight of exponent, seven of fraction.
    sign, exponent, fraction = 1 - 2.0 * (halves >> 15), (halves >> 7 & 255).astype(int), (halves & 127) / 128
    normal = np.ldexp(1 + fraction, exponent - 127)
    special = np.where(fraction > 0, np.nan, np.inf)
    want = sign * np.where(exponent == 255, special, np.where(exponent == 0, np.ldexp(fraction, -126), normal))
    assert np.array_equal(got["x"], want.reshape(256, 256), equal_nan=True)


def test_only_what_is_asked_for_is_read(tmp_path):
    content = tensors({"x": f32(), "float8": FLOAT8, "y": f32(X.T), "future": ("F4", [3], b"12")})
    (tmp_path / "file").write_bytes(content)
    assert_same_bits(lg.load(tmp_path / "file", names=["y", "x"]), {"x": X, "y": X.T})
    assert lg.load(tmp_path / "file", names=()) == {}
    for names, told in (
        ({"float8"}, "float8 in .*file has dtype F8_E4M3, "),
        (["x", "future"], "future in .*dtype F4,"),
    ):
        with pytest.raises(lg.DtypeError, match=told):
            lg.load(tmp_path / "file", names=names)
    with pytest.raises(lg.DtypeError, match=r"float8 in .*file has dtype F8_E4M3, which NumPy does not have"):
        lg.load(tmp_path / "file")
    with pytest.raises(lg.ArgumentError, match="lacks an array 'z'; it holds x, float8, y, future"):
        lg.load(tmp_path / "file", names=["z"])
    for names in ("x", [1], 3, str, np.array(2)):
        with pytest.raises(lg.ArgumentError, match="expected names of arrays"):
            lg.load(tmp_path / "file", names=names)


def test_what_lies_beside_the_parameters_of_a_model_does_not_matter(tmp_path, rng):
    want = model(rng)
    lg.save(tmp_path / "model", want)
    with safetensors.safe_open(tmp_path / "model", "np") as file:
        metadata = file.metadata()
    params = {name: f32(x) for name, x in want.params.items()}
    (tmp_path / "more").write_bytes(tensors({"a": FLOAT8, **params, "z": ("BF16", [1], b"??")}, metadata=metadata))
    loaded = lg.load(tmp_path / "more")
    assert loaded.config == CONFIG
    assert_same_bits(loaded.params, want.params)
    assert_same_bits(lg.load(tmp_path / "more", names=["head"]), {"head": want.params["head"]})


REFUSED = {
    "a name of the format": ({"__metadata__": X}, lg.ArgumentError, "'__metadata__', which the format keeps"),
    "a name that is a number": ({1: X}, lg.ArgumentError, "an array is named 1; expected text"),
    "a name that is half a character": ({"\ud800": X}, lg.ArgumentError, "UTF-8"),
    "a number of Python": ({"x": 1.5}, lg.DtypeError, "x is a float; expected a NumPy array"),
    "a number of half precision": ({"x": np.float16(1)}, lg.DtypeError, "x has dtype float16"),
    "integers": ({"x": X.astype(int)}, lg.DtypeError, "x has dtype int64"),
}


@pytest.mark.parametrize(("arrays", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_saved_is_refused_and_the_file_stays_as_it_was(arrays, error, message, tmp_path):
    lg.save(tmp_path / "file", {"x": X})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(error, match=re.escape(message)):
        lg.save(tmp_path / "file", {"y": X, **arrays})
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("path", [3, None, "a\0b", "\ud800", ["file"]])
@pytest.mark.parametrize("use", [lg.load, lambda path: lg.save(path, {"x": X})], ids=["load", "save"])
def test_a_path_that_is_none_is_an_argument_error(use, path):
    with pytest.raises(lg.ArgumentError, match=r"path is "):
        use(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(error, tmp_path, monkeypatch):
    lg.save(tmp_path / "file", {"x": X})
    before = (tmp_path / "file").read_bytes()

    def fail(handle):
        raise error

    monkeypatch.setattr(_files.os, "fsync", fail)
    for name in ("file", "new"):
        with pytest.raises(type(error)):
            lg.save(tmp_path / name, {"y": X})
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither modes nor such links")
def test_a_replaced_file_keeps_its_mode_and_a_link_to_it_stays_a_link(tmp_path):
    mask = os.umask(0o027)
    try:
        lg.save(tmp_path / "file", {"x": X})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    (tmp_path / "file").chmod(0o604)
    (tmp_path / "link").symlink_to("file")
    lg.save(tmp_path / "link", {"y": X})
    assert (tmp_path / "link").is_symlink()
    assert list(lg.load(tmp_path / "file")) == ["y"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such device")
def test_a_device_is_written_to_and_not_replaced():
    lg.save("/dev/null", {"x": X})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_path_that_cannot_be_written_is_python_s_own_error_and_named(tmp_path):
    for path in (tmp_path / "missing" / "file", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            lg.save(path, {"x": X})
    assert os.listdir(tmp_path) == []


def config_file(rng, tmp_path, **changes):
    """A model's file with another configuration in its metadata."""
    lg.save(tmp_path / "model", model(rng))
    with safetensors.safe_open(tmp_path / "model", "np") as file:
        config = json.loads(file.metadata()[CONFIG_KEY])
    params = {name: f32(x) for name, x in model(rng).params.items()}
    (tmp_path / "model").write_bytes(tensors(params, metadata={CONFIG_KEY: json.dumps(config | changes)}))
    return tmp_path / "model"


CHANGED = {
    "layers without end": ({"n_layers": 10**9}, "n_layers is 1000000000; expected 2, of which there are tensors"),
    "layers beyond 64 bits": ({"n_layers": 10**30}, f"n_layers is {10**30}; expected 2"),
    "layers that are text": ({"n_layers": "2"}, "n_layers is '2'; expected 2"),
    "a width without end": ({"d_model": 10**6}, "embed in .* has shape (13, 16); expected (13, 1000000) to match"),
    "a vocabulary without end": (
        {"vocab_size": 10**12},
        "embed in .* has shape (13, 16); expected (1000000000000, 16)",
    ),
    "sizes without end": ({"d_ff": 2**60}, "the parameters are "),
    "a norm with more parameters": ({"norm": "layer"}, "lacks 'layers.0.attn_norm.bias'; expected an array of shape"),
    "an unknown field": ({"magic": 1}, "magic"),
    "an engine of no kind": ({"engine": {"kind": ["Exact"]}}, "cannot be read"),
    "an engine nested deeply": ({"engine": [[[[[[]]]]]]}, "cannot be read"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_a_configuration_that_its_file_does_not_fit_is_refused_before_anything_is_built(
    changes, message, tmp_path, rng
):
    path = config_file(rng, tmp_path, **changes)
    with refused_without_memory(message):
        lg.load(path)


@contextmanager
def refused_without_memory(message):
    """Expects a `LingradError` with a message, and that no more than a few MB were taken until then."""
    tracemalloc.start()
    try:
        with pytest.raises(lg.LingradError) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert re.search(".*".join(map(re.escape, message.split(".*"))), str(caught.value)), caught.value


@pytest.mark.parametrize("n_layers", [2**16 + 1, 10**9, 2**62])
def test_layers_without_end_are_refused_with_the_bytes_they_would_take(n_layers):
    each = small_config(n_layers=2).param_count() - small_config(n_layers=1).param_count()
    count = small_config(n_layers=1).param_count() + (n_layers - 1) * each
    message = f"n_layers is {n_layers}, of {count} parameters; expected at most 65536: in float32 they would take "
    with refused_without_memory(f"{message}{4 * count} bytes"):
        small_config(n_layers=n_layers)


def test_the_number_of_parameters_is_that_of_their_shapes():
    for options in ({}, {"norm": "layer", "n_layers": 5}, {"n_layers": 1}):
        config = small_config(**options)
        assert config.param_count() == sum(np.zeros(shape).size for shape in config.param_shapes().values())


NOT_SAFETENSORS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header beyond the file": struct.pack("<Q", 2**40) + b"{}",
    "a header beyond all files": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": with_header(b"{"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "nested deeply": with_header(b'{"x":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "a list": with_header(b"[]"),
    "a number": with_header(b"1"),
    "digits without end": with_header(b'{"x":' + b"1" * 10_000 + b"}"),
    "metadata that is text": with_header(b'{"__metadata__": "x"}'),
    "metadata of numbers": with_header(b'{"__metadata__": {"x": 1}}'),
    "a name twice": with_header(
        b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},'
        b' "x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
        bytes(4),
    ),
    "an entry that is text": with_header(b'{"x": "F32"}'),
    "an entry without a shape": with_header(b'{"x": {"dtype": "F32", "data_offsets": [0, 0]}}'),
    "a shape that is text": tensors({"x": ("F32", "12", bytes(4))}),
    "a negative axis": tensors({"x": ("F32", [-1, -1], bytes(4))}),
    "half an axis": tensors({"x": ("F32", [0.5, 2], bytes(4))}),
    "an axis that is true": tensors({"x": ("F32", [True], bytes(4))}),
    "a dtype that is a number": tensors({"x": (32, [1], bytes(4))}),
    "a shape without end": tensors({"x": ("F32", [10**12], bytes(4))}),
    "a shape that wraps around": tensors({"x": ("F32", [2**32, 2**32], b"")}),
    "a shape that is empty and wraps around": tensors({"x": ("F32", [2**40, 2**40, 0], b"")}),
    "a hundred axes": tensors({"x": ("F32", [1] * 100, bytes(4))}),
    "more than the file holds": tensors({"x": ("F32", [1000], bytes(4))}, offsets=[0, 4000]),
    "far more than the file holds": tensors({"x": ("F32", [10**12], b"")}, offsets=[0, 4 * 10**12]),
    "more than the file holds, of an unknown dtype": tensors({"x": ("F8_E4M3", [9], b"")}, offsets=[0, 10**12]),
    "a tensor that begins late": tensors({"x": ("F32", [1], bytes(8))}, offsets=[4, 8]),
    "offsets the wrong way": tensors({"x": ("F32", [0], bytes(8))}, offsets=[8, 4]),
    "tensors that overlap": tensors({"x": ("F32", [1], b""), "y": ("F32", [1], bytes(4))}, offsets=[0, 4]),
    "bytes that belong to nothing": tensors({"x": f32()}, after=b"x"),
    "the end missing": tensors({"x": f32()})[:-1],
}


@pytest.mark.parametrize("content", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS.keys())
def test_what_is_no_sound_safetensors_file_is_refused_before_memory_is_taken(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with refused_without_memory("cannot be read as safetensors"):
        lg.load(tmp_path / "file")


@pytest.mark.parametrize(
    "engine", [{"coefficients": [1, 10**400, 1]}, {"shift": [[10**400], [1]]}, {"degree": 10**400}]
)
def test_a_number_beyond_all_floats_in_a_configuration_is_an_argument_error(engine, tmp_path):
    text = json.dumps({"n_layers": 1, "engine": {"kind": "Polynomial"} | engine})
    (tmp_path / "file").write_bytes(tensors({"x": f32()}, metadata={CONFIG_KEY: text}))
    with pytest.raises(lg.ArgumentError, match=r"the configuration in .* cannot be read"):
        lg.load(tmp_path / "file")


def test_metadata_nested_deeply_is_an_argument_error(tmp_path):
    text = '{"engine": ' + "[" * 200_000 + "]" * 200_000 + "}"
    (tmp_path / "file").write_bytes(tensors({"x": f32()}, metadata={CONFIG_KEY: text}))
    with pytest.raises(lg.ArgumentError, match=r"the configuration in .* cannot be read"):
        lg.load(tmp_path / "file")


def npy(shape="(3, 4)", descr="'<f4'", data=DATA, version=1, end="}"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {end}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def npz(**members):
    """The bytes of an archive of ``name: bytes`` or ``name: (bytes, way of compression)``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            data, way = content if isinstance(content, tuple) else (content, zipfile.ZIP_STORED)
            archive.writestr(f"{name}.npy", data, way)
    return file.getvalue()


def read_npz(content, names="x"):
    return _files.read_npz(io.BytesIO(content), "heads.npz", names)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_archive_are_read_as_numpy_reads_them(save):
    arrays = {"x": X, "y": X.T.astype(float), "z": np.array(3), "e": np.zeros((0, 2)), "n": X[::2]}
    file = io.BytesIO()
    save(file, **arrays, text=np.array(["a"]), objects=np.array([None]))
    got, held = read_npz(file.getvalue(), [*arrays, "missing"])
    assert_same_bits(got, arrays)
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in arrays.items()}
    assert held == [*arrays, "text", "objects"]


def encrypted(content):
    """With the flag of encryption at each of its members."""
    found = bytearray(content)
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        found[found.index(start) + flags] |= 1
    return bytes(found)


def claiming(content, size):
    """With another number of bytes in each of its members, compressed and not."""
    found = bytearray(content)
    for start, at in ((b"PK\x03\x04", 18), (b"PK\x01\x02", 20)):
        struct.pack_into("<II", found, found.index(start) + at, size, size)
    return bytes(found)


BAD_NPZ = {
    "no archive": (b"text", "it is not an archive"),
    "half an archive": (npz(x=npy())[:-40], "it is not an archive"),
    "an array without end": (npz(x=npy("(10**12,)")), "cannot be read as .npz"),
    "an array far beyond its bytes": (
        npz(x=npy("(1000000000000,)")),
        "x.npy has the shape (1000000000000,) in float32",
    ),
    "an array beyond its bytes": (npz(x=npy("(3, 5)")), "x.npy of shape (3, 5) in float32 has 48 bytes; expected 60"),
    "an array that wraps around": (npz(x=npy("(2**32, 2**32)")), "cannot be read"),
    "axes that wrap around": (npz(x=npy(f"({2**32}, {2**32})")), "x.npy has the shape"),
    "a negative axis": (npz(x=npy("(-3, -4)")), "x.npy has the shape (-3, -4)"),
    "a negative axis and another": (npz(x=npy("(-3, 0)")), "x.npy has the shape (-3, 0)"),
    "half an axis": (npz(x=npy("(0.5,)")), "shape is not valid"),
    "a member beyond the file": (claiming(npz(x=npy("(1000000000,)")), 4 * 10**9 + 200), "would take 4000000200 bytes"),
    "no header": (npz(x=b""), "cannot be read"),
    "half a header": (npz(x=npy()[:20]), "cannot be read"),
    "a header without end": (npz(x=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)), "cannot be read"),
    "a long header": (npz(x=npy(end="'x': " + "9" * 20_000 + "}")), "cannot be read"),
    "a header nested deeply": (npz(x=npy("(" * 4000)), "cannot be read"),
    "a header of many signs": (npz(x=npy("-" * 9000 + "1")), "cannot be read"),
    "a later version": (npz(x=b"\x93NUMPY\x03\x00" + npy(version=2)[8:]), "of version (3, 0)"),
    "objects": (npz(x=npy(descr="'|O'")), "x.npy holds Python's objects"),
    "numbers without bytes": (npz(x=npy(descr="'|V0'", data=b"")), "cannot be read"),
    "an unknown dtype": (npz(x=npy(descr="'magic'")), "cannot be read"),
    "another compression": (npz(x=(npy(), zipfile.ZIP_LZMA)), "compressed in a way that NumPy does not write"),
    "encrypted": (encrypted(npz(x=npy())), "encrypted"),
    "spoiled": (npz(x=npy()).replace(DATA, DATA[::-1], 1), "Bad CRC-32"),
    "spoiled where compressed": (
        npz(x=(npy(), zipfile.ZIP_DEFLATED)).replace(b"x.npy", b"x.npy" + b"\xff" * 9, 1),
        "cannot be read",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_NPZ.values(), ids=BAD_NPZ.keys())
def test_what_is_no_sound_archive_is_refused_before_memory_is_taken(content, message):
    with refused_without_memory(message):
        read_npz(content)


def test_a_member_that_becomes_far_larger_is_read_no_further_than_its_shape():
    data = npy(data=DATA + bytes(2**26))
    content = npz(x=(data, zipfile.ZIP_DEFLATED))
    tracemalloc.start()
    try:
        got, _ = read_npz(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert np.array_equal(got["x"], X)


def test_a_file_that_is_no_longer_whole_when_it_is_read_is_told(tmp_path):
    path = Path(tmp_path / "file")
    path.write_bytes(tensors({"x": f32(np.ones(10**5))}))  # more than Python reads ahead
    with path.open("rb") as file:
        stored = _files.SafeTensors(file, "file")
        os.truncate(path, path.stat().st_size - 5)
        with pytest.raises(lg.ArgumentError, match="file has become shorter while it was read"):
            stored.read("x")
