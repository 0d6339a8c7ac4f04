"""Arrays of other libraries, in and out, without a copy; and what is said where that cannot be."""

import re
import sys
from types import SimpleNamespace

import array_api_strict as strict
import numpy as np
import pytest
from helpers import assert_close, draw, relative_error
from limits import HALF, ORACLE

import lingrad_rs as lg
from lingrad_rs.backends import select


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed, which the tests do not require")


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="JAX is not installed, which the tests do not require")


def test_pytorch_s_memory_is_read_and_written_in_place(torch):
    x = torch.arange(12.0).reshape(3, 4).T
    y = lg.from_dlpack(x)
    assert type(y) is np.ndarray
    assert y.ctypes.data == x.data_ptr()
    assert y.dtype == np.float32
    assert y.shape == (4, 3)
    assert y.strides == (4, 16)
    y[1, 2] = -1
    assert x[1, 2] == -1
    back = torch.from_dlpack(y)
    assert back.data_ptr() == x.data_ptr()


def test_the_memory_outlives_the_tensor(torch):
    y = lg.from_dlpack(torch.full((1000, 100), 7.0))
    assert (np.full(y.shape, 3.0, y.dtype) == 3).all()  # where an allocator might give the tensor's memory out again
    assert (y == 7).all()


def test_results_go_back_to_pytorch_without_a_copy(torch, rng):
    q = rng.standard_normal((20, 4))
    out, vjp = lg.attention_vjp(q, q, q)
    for x in (out, *vjp(q)):
        assert torch.from_dlpack(x).data_ptr() == x.ctypes.data


def test_jax_s_read_only_arrays_are_read_in_place_and_results_go_back(jax, rng):
    arrays = {name: jax.numpy.asarray(x, dtype="float32") for name, x in draw(rng, n=50).items()}
    taken = {name: lg.from_dlpack(x) for name, x in arrays.items()}
    for name, x in arrays.items():
        assert type(taken[name]) is np.ndarray
        assert taken[name].ctypes.data == x.unsafe_buffer_pointer()
        assert not taken[name].flags.writeable
    out, vjp = lg.attention_vjp(taken["q"], taken["k"], taken["v"], engine=lg.Exact(), causal=True)
    got = {"out": out} | dict(zip(("dq", "dk", "dv"), vjp(taken["dout"]), strict=True))

    def attend(q, k, v):
        scores = q @ k.T / q.shape[-1] ** 0.5
        return jax.nn.softmax(jax.numpy.where(jax.numpy.tril(jax.numpy.ones_like(scores)) > 0, scores, -1e30)) @ v

    want, pullback = jax.vjp(attend, arrays["q"], arrays["k"], arrays["v"])
    wanted = {"out": want} | dict(zip(("dq", "dk", "dv"), pullback(arrays["dout"]), strict=True))
    assert_close(got, wanted, ORACLE[np.dtype(np.float32)])
    back = jax.dlpack.from_dlpack(out)
    # JAX copies what is not aligned to 64 bytes.
    assert (back.unsafe_buffer_pointer() == out.ctypes.data) == (out.ctypes.data % 64 == 0)
    assert np.array_equal(back, out)


class Tensor:
    """An array of a library that nobody knows, and that speaks DLPack."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


@pytest.mark.parametrize("of", [Tensor, lambda x: strict.asarray(x, copy=False)], ids=["unknown", "array-api-strict"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_any_library_s_memory_is_read_in_place_and_kept_alive(dtype, of):
    x = np.arange(24, dtype=dtype).reshape(4, 6)[::2, 1::2].T
    y = lg.from_dlpack(of(x))
    assert type(y) is np.ndarray
    assert (y.dtype, y.shape, y.strides, y.ctypes.data) == (x.dtype, x.shape, x.strides, x.ctypes.data)
    want = x.copy()
    del x
    assert np.array_equal(y, want)


def test_attention_takes_what_dlpack_hands_over_and_its_results_go_back(rng):
    q, k, v, dout = (rng.standard_normal((30, 4)) for _ in range(4))
    want, want_vjp = lg.attention_vjp(q, k, v)
    out, vjp = lg.attention_vjp(*(lg.from_dlpack(Tensor(x)) for x in (q, k, v)))
    back = [strict.from_dlpack(x) for x in (out, *vjp(lg.from_dlpack(Tensor(dout))))]
    for got, x in zip(back, (want, *want_vjp(dout)), strict=True):
        assert np.array_equal(np.asarray(got), x)


def test_arrays_of_numpy_come_back_as_they_are():
    x = np.arange(6.0).reshape(2, 3)[:, ::2]
    x.setflags(write=False)
    assert lg.from_dlpack(x) is x


@pytest.mark.gpu
def test_a_gpu_s_memory_is_read_in_place(torch):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is built without CUDA")
    x = torch.arange(12.0, device="cuda").reshape(3, 4).T
    y = lg.from_dlpack(x)
    assert isinstance(y, select.cupy().ndarray)
    assert y.data.ptr == x.data_ptr()
    assert y.strides == (4, 16)
    assert torch.from_dlpack(y).data_ptr() == x.data_ptr()
    assert lg.from_dlpack(y) is y


@pytest.mark.gpu
def test_jax_s_arrays_on_a_gpu_are_read_in_place(jax):
    if jax.default_backend() != "gpu":
        pytest.skip("JAX is built without CUDA")
    x = jax.numpy.arange(12.0)
    y = lg.from_dlpack(x)
    assert isinstance(y, select.cupy().ndarray)
    assert y.data.ptr == x.unsafe_buffer_pointer()
    assert np.array_equal(jax.dlpack.from_dlpack(y), x)


def test_tensors_in_bfloat16_are_read_in_place_and_computed_with(torch, rng):
    x = torch.asarray(rng.standard_normal((2, 30, 8))).to(torch.bfloat16)
    y = lg.from_dlpack(x.transpose(0, 1))
    assert y.dtype.name == "bfloat16"
    assert y.ctypes.data == x.data_ptr()
    assert (y.shape, y.strides) == ((30, 2, 8), (16, 480, 2))
    assert np.array_equal(y.astype(np.float32), x.transpose(0, 1).float().numpy())
    out = lg.attention(*(lg.from_dlpack(x) for _ in range(3)), engine=lg.Exact())
    want = torch.nn.functional.scaled_dot_product_attention(*[x.float()[None]] * 3)
    assert relative_error(out.astype(np.float64), want[0].numpy()) <= HALF[out.dtype]


def test_jax_s_arrays_in_bfloat16_are_read_in_place(jax):
    x = jax.numpy.asarray([[1.5, -2.0], [0.25, 3.0]], "bfloat16")
    y = lg.from_dlpack(x)
    assert y.ctypes.data == x.unsafe_buffer_pointer()
    assert y.astype(float).tolist() == [[1.5, -2.0], [0.25, 3.0]]


REFUSED = {
    "requires grad": (lambda torch: torch.ones(3, requires_grad=True), "requires grad; expected one that does not: x."),
    "a parameter": (lambda torch: torch.nn.Parameter(torch.ones(3)), "x.detach()"),
    "sparse": (lambda torch: torch.ones(3, 3).to_sparse(), "x.to_dense()"),
    "conjugated": (lambda torch: torch.ones(3, dtype=torch.complex64).conj(), "conjugate bit"),
    "negated": (lambda torch: torch.ones(3, dtype=torch.complex64).conj().imag, "x.resolve_neg()"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tensor_that_cannot_be_handed_over_is_told_with_its_remedy(make, message, torch):
    with pytest.raises(lg.DtypeError, match=re.escape(message)):
        lg.from_dlpack(make(torch))


def test_the_reason_of_another_library_is_chained(torch):
    with pytest.raises(lg.DtypeError) as caught:
        lg.from_dlpack(torch.ones(3, 3).to_sparse())
    assert isinstance(caught.value.__cause__, BufferError)


def test_a_tensor_without_memory_is_a_device_error(torch):
    with pytest.raises(lg.DeviceError, match=re.escape("x is a torch.Tensor whose device DLPack does not have")):
        lg.from_dlpack(torch.ones(3, device="meta"))


def test_a_traced_array_of_jax_is_told(jax):
    with pytest.raises(lg.LingradError, match="Tracer"):
        jax.jit(lambda x: lg.from_dlpack(x))(jax.numpy.ones(3))


@pytest.mark.parametrize("value", [None, [1.0, 2.0], 3.0, "array"])
def test_what_does_not_speak_dlpack_is_a_dtype_error(value):
    with pytest.raises(lg.DtypeError, match=f"x is a {type(value).__name__}; expected an array with __dlpack__"):
        lg.from_dlpack(value)


def test_an_object_whose_attributes_raise_is_a_dtype_error():
    class Raises:
        def __getattr__(self, name):
            raise KeyError(name)

    with pytest.raises(lg.DtypeError, match=r"Raises; expected an array with __dlpack__"):
        lg.from_dlpack(Raises())


def test_a_mask_is_not_dropped():
    with pytest.raises(lg.DtypeError, match="x is a masked array"):
        lg.from_dlpack(np.ma.ones(3))


class Elsewhere:
    """An array on a device of some kind."""

    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **options):
        raise AssertionError("asked for before it is known that its device will do")


@pytest.mark.parametrize(("kind", "name"), [(10, "ROCm"), (8, "Metal"), (14, "oneAPI"), (99, "unknown")])
def test_a_device_of_another_kind_is_named(kind, name):
    message = f"x is a test_interchange.Elsewhere on a device of kind {name} ({kind} in DLPack); expected the CPU"
    with pytest.raises(lg.DeviceError, match=re.escape(message)):
        lg.from_dlpack(Elsewhere(kind))


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, name):
        super().__init__(f"{name}: reason")
        self.status = status


def fake_cupy(*, count=1, error=None, driver=13000):
    """A CuPy that counts devices, or fails to."""

    def get_device_count():
        if error is not None:
            raise error
        return count

    runtime = SimpleNamespace(
        getDeviceCount=get_device_count, driverGetVersion=lambda: driver, CUDARuntimeError=CUDARuntimeError
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), from_dlpack=lambda x: ("on the GPU", x))


@pytest.fixture
def import_cupy_as(monkeypatch):
    """Makes ``import cupy`` give a module, or raise."""

    def install(result):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        real = select.importlib.import_module

        def import_module(name, package=None):
            if name != "cupy":
                return real(name, package)
            if isinstance(result, ImportError):
                raise result
            return result

        monkeypatch.setattr(select.importlib, "import_module", import_module)

    return install


NO_CUPY = {
    "not installed": (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "pip install 'lingrad_rs[cuda12]'"),
    "not installed, of CUDA 13": (ModuleNotFoundError("no", name="cupy"), "'lingrad_rs[cuda13]'"),
    "broken": (ImportError("libcublas.so.12: not found"), "CuPy is installed and does not load: libcublas.so.12"),
    "a part missing": (ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"), "does not load: No mod"),
    "no driver": (
        fake_cupy(error=CUDARuntimeError(35, "cudaErrorInsufficientDriver"), driver=0),
        "there is no NVIDIA driver on this machine",
    ),
    "an old driver": (
        fake_cupy(error=CUDARuntimeError(35, "cudaErrorInsufficientDriver"), driver=11040),
        "the NVIDIA driver is too old for CuPy",
    ),
    "no device": (fake_cupy(error=CUDARuntimeError(100, "cudaErrorNoDevice")), "there is no GPU"),
    "devices hidden": (fake_cupy(count=0), "there is no GPU"),
    "anything else": (fake_cupy(error=CUDARuntimeError(999, "cudaErrorUnknown")), "does not start: cudaErrorUnknown"),
}


@pytest.mark.parametrize("kind", [2, 13])
@pytest.mark.parametrize(("cupy", "message"), NO_CUPY.values(), ids=NO_CUPY.keys())
def test_a_gpu_that_cannot_be_used_is_told_why(cupy, message, kind, import_cupy_as):
    import_cupy_as(cupy)
    with pytest.raises(lg.DeviceError, match=re.escape(message)):
        lg.from_dlpack(Elsewhere(kind))


def test_a_gpu_s_array_is_handed_to_cupy(import_cupy_as):
    import_cupy_as(fake_cupy())
    x = Elsewhere(2)
    assert lg.from_dlpack(x) == ("on the GPU", x)


def test_arrays_of_the_cpu_need_no_cupy(torch, import_cupy_as):
    import_cupy_as(ImportError("asked for"))
    assert type(lg.from_dlpack(torch.ones(3))) is np.ndarray
