"""What is particular to the GPU path, under NumPy and array-api-strict: it agrees with the compiled core, its steps are
of any size, it waits for the device a fixed number of times, and memory that runs out is no end of it."""

import contextlib
import gc
import sys
import types
import weakref

import array_api_strict as strict
import numpy as np
import pytest
from conftest import CUPY, GPU_NUMPY, GPU_STRICT, RUST, STRICT_DEVICE
from cuda_on_cpu import NEEDS_COMPILER, run_on_cpu
from helpers import assert_close, cast, draw, random_params, relative_error, run_attention, small_config
from limits import FLOAT32_MODEL, ORACLE, REORDERED_STEPS

import lingrad_rs as lg
from lingrad_rs import Exact, Landmark, Polynomial
from lingrad_rs.backends import select
from lingrad_rs.backends.array import device, engines, kernels
from lingrad_rs.backends.array.problem.heads import Heads

ENGINES = {
    "exact": Exact(),
    "degree 2": Polynomial(),
    "degree 3, consistent": Polynomial(degree=3, gradient="consistent"),
    "fitted": Polynomial(coefficients="fitted"),
    "given coefficients": Polynomial(coefficients=(1.1, 0.9, 0.6)),
    "given shift": Polynomial(shift=((0.1,) * 5, (-0.2,) * 5)),
    "no window": Polynomial(window=0),
    "wide window": Polynomial(window=300),
    "landmarks": Landmark(rank=40),
}
FULL = {
    "means": Polynomial(shift="mean"),
    "means, consistent, fitted": Polynomial(shift="mean", gradient="consistent", coefficients="fitted"),
}
CAUSAL = {
    "polynomial diagonal": Polynomial(diagonal="polynomial"),
    "polynomial diagonal, consistent": Polynomial(diagonal="polynomial", gradient="consistent"),
}
CASES = [
    pytest.param(engine, causal, id=f"{name}, {'causal' if causal else 'full'}")
    for causal in (False, True)
    for name, engine in (ENGINES | (CAUSAL if causal else FULL)).items()
]


@pytest.fixture
def on(monkeypatch):
    """Makes a backend that of the calls that follow."""
    kinds = list(select.KINDS)

    def choose(backend):
        monkeypatch.setattr(select, "KINDS", [*backend.kinds, *kinds])
        return backend

    return choose


@pytest.fixture
def steps(monkeypatch):
    """Sets how many numbers a temporary array may hold."""

    def choose(numbers):
        monkeypatch.setattr(device, "_LEAST", 1)
        monkeypatch.setattr(device, "_USUAL", numbers)

    return choose


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("engine", "causal"), CASES)
def test_both_paths_agree(engine, causal, bias, on, dtype, rng):
    inputs = draw(rng, n=1500, heads=(2, 2), key_heads=(2, 1), bias=bias, size=0.4)
    inputs = cast(inputs, dtype)
    want = run_attention(on(RUST), inputs, engine=engine, causal=causal)
    got = run_attention(on(GPU_NUMPY), inputs, engine=engine, causal=causal)
    assert_close(got, want, ORACLE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "scale"), [(3e5, 1e-12), (3e-7, 1e12)])
def test_both_paths_agree_where_only_the_scores_are_of_a_usual_size(size, scale, causal, on, rng):
    inputs = cast(draw(rng, n=300, size=size), np.float32)
    results = [
        run_attention(on(backend), inputs, engine=Polynomial(degree=4), causal=causal, scale=scale)
        for backend in (RUST, GPU_NUMPY)
    ]
    assert_close(results[1], results[0], ORACLE[np.dtype(np.float32)])


def test_features_that_nothing_meets_may_overflow(on, rng):
    inputs = draw(rng, n=300, size=0.4)
    inputs["q"][5] *= 1e9  # a block that no key is far from
    inputs["k"] *= 1e-9
    inputs = cast(inputs, np.float32)
    want, got = (
        run_attention(on(backend), inputs, engine=Polynomial(degree=4), causal=True) for backend in (RUST, GPU_NUMPY)
    )
    assert_close(got, want, ORACLE[np.dtype(np.float32)])


@pytest.mark.parametrize("engine", [Polynomial(coefficients="fitted"), Landmark(rank=40)])
@pytest.mark.parametrize("last", [False, True])
def test_where_few_keys_are_left_samples_are_of_those(last, engine, on, rng):
    inputs = draw(rng, n=300, m=9000, size=0.4)
    live = np.arange(8960, 9000) if last else rng.choice(9000, 40, replace=False)
    inputs["key_bias"] = np.full(9000, -np.inf)
    inputs["key_bias"][live] = rng.standard_normal(40)
    want, got = (run_attention(on(backend), inputs, engine=engine) for backend in (RUST, GPU_NUMPY))
    assert_close(got, want, ORACLE[np.dtype(np.float64)])


@pytest.mark.parametrize("numbers", [1, 3000, 1 << 16])
@pytest.mark.parametrize(("engine", "causal"), CASES)
def test_steps_of_any_size_give_the_same(engine, causal, numbers, on, steps, rng):
    inputs = draw(rng, n=500, heads=(4,), key_heads=(2,), bias=True, size=0.4)
    on(GPU_NUMPY)
    want = run_attention(GPU_NUMPY, inputs, engine=engine, causal=causal)
    steps(numbers)
    assert_close(run_attention(GPU_NUMPY, inputs, engine=engine, causal=causal), want, REORDERED_STEPS)


@pytest.mark.parametrize("numbers", [1, 3000])
def test_a_model_in_steps_of_any_size_gives_the_same(numbers, on, steps, rng):
    config = small_config(engine=Polynomial(), norm="layer")
    params, (tokens, targets) = random_params(config, rng), rng.integers(0, config.vocab_size, (2, 2, 150))
    on(GPU_NUMPY)
    want = lg.Transformer(config, params).value_and_grad(tokens, targets)[1]
    steps(numbers)
    got = lg.Transformer(config, params).value_and_grad(tokens, targets)[1]
    assert_close(got, want, FLOAT32_MODEL)


def waits(monkeypatch, n, engine, causal, rng):
    """How often a forward and backward pass reads a number of the device."""
    count = 0

    def counted(method):
        def call(self, *args):
            nonlocal count
            count += 1
            return method(self, *args)

        return call

    array = strict._array_object.Array
    inputs = cast(draw(rng, n=n, heads=(2,), bias=True, size=0.4), np.float32)
    with monkeypatch.context() as patch:
        for name in ("__bool__", "__float__", "__int__", "__index__", "to_device"):
            patch.setattr(array, name, counted(getattr(array, name)))
        arrays = {name: GPU_STRICT.array(x) for name, x in inputs.items()}
        dout = arrays.pop("dout")
        lg.attention_vjp(**arrays, engine=engine, causal=causal)[1](dout)
    return count


@pytest.mark.parametrize(("engine", "causal"), CASES)
def test_waits_for_the_device_do_not_grow_with_the_tokens(engine, causal, on, steps, monkeypatch, rng):
    on(GPU_STRICT)
    steps(1 << 13)  # the sampled tokens fit
    few, many = (waits(monkeypatch, n, engine, causal, rng) for n in (130, 700))
    assert 0 < few == many


def test_temporary_arrays_are_sized_by_the_free_memory(monkeypatch):
    free = 1 << 33
    runtime = types.SimpleNamespace(is_hip=False, memGetInfo=lambda: (free, 1 << 40))
    pool = types.SimpleNamespace(free_bytes=lambda: 1 << 20, get_limit=lambda: 0, used_bytes=lambda: 0)
    cupy = types.ModuleType("cupy")
    cupy.cuda, cupy.get_default_memory_pool = types.SimpleNamespace(runtime=runtime), lambda: pool
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(device, "is_cupy", lambda x: True)
    monkeypatch.setattr(device.array_api_compat, "array_namespace", lambda x: np)
    monkeypatch.setattr(device.array_api_compat, "device", lambda x: "GPU")
    for dtype in (np.float32, np.float64):
        x = types.SimpleNamespace(device=contextlib.nullcontext(), dtype=np.dtype(dtype))
        for free in (1 << 20, 1 << 30, 1 << 33, 1 << 40):
            together = device._ARRAYS * device.space_of(x).numbers * x.dtype.itemsize
            most = device._ARRAYS * device._MOST * x.dtype.itemsize
            assert together <= max(free, device._ARRAYS * device._LEAST * x.dtype.itemsize)
            assert together >= min(most, free - (1 << 29))
    pool.get_limit = lambda: 1 << 30
    assert device._ARRAYS * device.space_of(x).numbers * x.dtype.itemsize <= 1 << 30


def test_a_step_is_tried_again_smaller_where_memory_runs_out(on, steps, monkeypatch, rng):
    on(GPU_NUMPY)
    inputs = draw(rng, n=300, size=0.4)
    want = run_attention(GPU_NUMPY, inputs, engine=Polynomial())
    forward, numbers = engines.forward, []

    def scarce(sp, *args):
        numbers.append(sp.numbers)
        result = forward(sp, *args)
        if len(numbers) < 3:
            raise MemoryError
        return result

    monkeypatch.setattr(engines, "forward", scarce)
    assert_close(run_attention(GPU_NUMPY, inputs, engine=Polynomial()), want, REORDERED_STEPS)
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[2]


@pytest.mark.parametrize(
    ("name", "status", "other"),
    [("CUDARuntimeError", 2, 1), ("CUDADriverError", 2, 1), ("CUBLASError", 3, 2), ("CUBLASError", 1, 4)],
)
def test_memory_that_cuda_s_libraries_lack_is_memory_that_runs_out(name, status, other, on, monkeypatch, rng):
    on(GPU_NUMPY)
    q = rng.standard_normal((9, 4))
    raised = type(name, (RuntimeError,), {"status": status})

    def lacks(*args):
        raise raised

    monkeypatch.setattr(engines, "forward", lacks)
    with pytest.raises(lg.DeviceError, match="too little memory"):
        lg.attention(q, q, q)
    raised.status = other
    with pytest.raises(raised):
        lg.attention(q, q, q)


@pytest.mark.parametrize(
    ("error", "is_missing"),
    [
        (ImportError("libcublas.so.12"), True),
        (type("DynamicLibNotFoundError", (RuntimeError,), {})("nvrtc"), True),
        (RuntimeError("Failed to find CUDA headers."), True),
        (RuntimeError("something else"), False),
    ],
)
def test_a_library_of_cuda_that_is_missing_is_a_device_error_that_helps(error, is_missing, on, monkeypatch):
    def fails(sp):
        raise error

    space = device.Space(np, "GPU", 1)
    monkeypatch.setattr(device, "is_cupy", lambda x: True)
    monkeypatch.setattr(device, "space_of", lambda x: space)
    on_gpu = types.SimpleNamespace(device=contextlib.nullcontext())
    with pytest.raises(
        lg.DeviceError if is_missing else RuntimeError, match=r"\[ctk\]" if is_missing else "else"
    ) as raised:
        device.run(on_gpu, fails)
    assert is_missing == (raised.value.__cause__ is error)


def test_too_little_memory_is_an_error_and_leaves_nothing_allocated(on, monkeypatch, rng):
    on(GPU_NUMPY)
    inputs = draw(rng, n=300, size=0.4)
    kept = []

    def never(sp, own, heads):
        room = np.zeros(1000)
        kept.append(weakref.ref(room))
        raise MemoryError

    monkeypatch.setattr(engines, "forward", never)
    with pytest.raises(lg.DeviceError, match="too little memory") as raised:
        run_attention(GPU_NUMPY, inputs, engine=Exact())
    gc.collect()
    assert len(kept) > 1
    assert all(room() is None for room in kept)
    assert raised.value is not None


def test_arrays_of_two_libraries_are_an_error(on, rng):
    on(GPU_STRICT)
    q, k, v = (rng.standard_normal((6, 4)) for _ in range(3))
    with pytest.raises(lg.DeviceError, match=r"k is a numpy.ndarray and q is a array_api_strict.*one library"):
        lg.attention(GPU_STRICT.array(q), k, v)
    with pytest.raises(lg.DeviceError, match=r"v is a array_api_strict.* and q is a numpy.ndarray"):
        lg.attention(q, k, GPU_STRICT.array(v))


def test_an_array_of_a_subclass_is_an_error(monkeypatch, rng):
    library = types.ModuleType("library")
    library.ndarray = type("ndarray", (), {})
    monkeypatch.setitem(sys.modules, "library", library)
    monkeypatch.setattr(select, "KINDS", [select.Kind("library", "ndarray", "array"), *select.KINDS])
    q = rng.standard_normal((6, 4))
    with pytest.raises(lg.DeviceError, match=r"k is a .*expected a plain library array"):
        lg.attention(q, type("Distributed", (library.ndarray,), {})(), q)


def test_a_tensor_that_does_not_show_where_it_lies_is_an_error_that_helps(rng):
    class Tensor:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")

    q = rng.standard_normal((6, 4))
    with pytest.raises(lg.DeviceError, match=r"k is a .*Tensor on a GPU.*from_dlpack\(k.detach\(\)\)"):
        lg.attention(q, Tensor(), q)


def test_arrays_on_two_devices_are_an_error(on, rng):
    on(GPU_STRICT)
    q, k, v = (GPU_STRICT.array(rng.standard_normal((6, 4))) for _ in range(3))
    other = v.to_device(strict.Device("CPU_DEVICE"))
    with pytest.raises(lg.DeviceError, match=r"v is on .*CPU_DEVICE.* and q is on .*device1.*one device"):
        lg.attention(q, k, other)
    out, vjp = lg.attention_vjp(q, k, v, engine=Exact())
    assert out.device == STRICT_DEVICE
    with pytest.raises(lg.DeviceError, match="dout is on"):
        vjp(out.to_device(strict.Device("CPU_DEVICE")))


def test_the_gpu_path_without_its_library_says_what_to_install(on, monkeypatch, rng):
    on(GPU_STRICT)
    q = GPU_STRICT.array(rng.standard_normal((6, 4)))
    for name in [name for name in sys.modules if name.startswith(("lingrad_rs.backends.array", "array_api_compat"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "array_api_compat", None)
    with pytest.raises(lg.DeviceError, match=r"pip install 'lingrad_rs\[cuda12\]'"):
        lg.attention(q, q, q)


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("engine", "causal"),
    [
        (Exact(), False),
        (Exact(), True),
        (Polynomial(), False),
        (Polynomial(), True),
        (Polynomial(degree=3, gradient="consistent", diagonal="polynomial"), True),
        (Polynomial(coefficients="fitted"), True),
        (Landmark(rank=20), False),
        (Landmark(rank=20), True),
    ],
)
def test_the_path_by_its_kernels_agrees_with_the_compiled_core(engine, causal, on, monkeypatch, dtype, rng):
    inputs = cast(draw(rng, n=1300, bias=True, size=0.4), dtype)
    want = run_attention(on(RUST), inputs, engine=engine, causal=causal)
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    run_on_cpu(monkeypatch)
    assert_close(run_attention(on(GPU_NUMPY), inputs, engine=engine, causal=causal), want, ORACLE[dtype])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize:UserWarning")
@pytest.mark.parametrize(("engine", "causal"), CASES)
def test_a_backward_pass_never_waits_for_the_gpu(engine, causal, rng):
    cupyx = pytest.importorskip("cupyx", reason="CuPy is not installed")
    inputs = {name: CUPY.array(x) for name, x in cast(draw(rng, n=3000, heads=(2,), size=0.4), np.float32).items()}
    heads = Heads(inputs["q"], inputs["k"], inputs["v"], None, causal, 0.3)
    sp = device.space_of(heads.q)
    out, saved = engines.forward(sp, [engine] * 2, heads)
    want = engines.backward(sp, heads, saved, out, inputs["dout"])
    with cupyx.allow_synchronize(False):
        got = engines.backward(sp, heads, saved, out, inputs["dout"])
    assert relative_error(CUPY.numpy(got.dk), CUPY.numpy(want.dk)) <= ORACLE[np.dtype(np.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "causal"), CASES)
def test_the_current_stream_is_the_one_that_computes(engine, causal, rng):
    cupy = select.cupy()
    inputs = cast(draw(rng, n=3000, heads=(2,), size=0.4), np.float32)
    want = run_attention(CUPY, inputs, engine=engine, causal=causal)
    with cupy.cuda.Stream(non_blocking=True):
        got = run_attention(CUPY, inputs, engine=engine, causal=causal)
    assert_close(got, want, ORACLE[np.dtype(np.float32)])
