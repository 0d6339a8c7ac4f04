"""The CUDA kernels: they compile for GPUs, and do what their plain twins do, here on the CPU and on a GPU there is."""

import cuda_on_cpu
import numpy as np
import pytest
from conftest import CUPY, GPU_NUMPY, ON_CUPY
from cuda_on_cpu import NEEDS_COMPILER, run_on_cpu
from helpers import relative_error
from limits import KERNEL, KERNEL_SUMS, REORDERED

from lingrad_rs.backends import select
from lingrad_rs.backends.array import device, kernels, tiles
from lingrad_rs.backends.array.linear import monomials

# The degrees that each file is compiled for.
FILES = {"tiles.cu": (None,), "monomials.cu": (1, 2, 4, 8)}


def source(file):
    return kernels.Kernel(file, "", ()).source()


def compile_for_gpu(kernel, architecture):
    """Machine code, and what the compiler remarks."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings and NVRTC are not installed (not Linux?)")

    def call(function, *args):
        status, *results = function(*args)
        assert status in (nvrtc.nvrtcResult.NVRTC_SUCCESS, nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION), status
        return results[0] if results else status == nvrtc.nvrtcResult.NVRTC_SUCCESS

    program = call(nvrtc.nvrtcCreateProgram, kernel.source().encode(), kernel.file.encode(), 0, [], [])
    options = [*kernel.options, f"--gpu-architecture={architecture}", "--ptxas-options=--warn-on-spills"]
    good = call(nvrtc.nvrtcCompileProgram, program, len(options), [option.encode() for option in options])
    log = bytes(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, log)
    log = log.rstrip(b"\0 ").decode()
    assert good, log
    code = bytes(call(nvrtc.nvrtcGetCUBINSize, program))
    call(nvrtc.nvrtcGetCUBIN, program, code)
    call(nvrtc.nvrtcDestroyProgram, program)
    return code, log


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("file", "degree"), [(file, degree) for file in FILES for degree in FILES[file]])
def test_kernels_compile_for_gpus_without_warnings_or_spilled_registers(file, degree, architecture, dtype):
    kernel = kernels._kernel("", np.empty(0, dtype), degree)
    assert kernel.file == file
    code, log = compile_for_gpu(kernel, architecture)
    assert log == ""
    assert code.startswith(b"\x7fELF")
    for name in cuda_on_cpu.names(source(file)):
        assert b".text." + name.encode() in code


def test_files_hold_the_kernels_that_are_called_by_name():
    names = [name for file in FILES for name in cuda_on_cpu.names(source(file))]
    assert sorted(names) == [
        "exponentials",
        "gaussian",
        "monomial_features",
        "monomial_pullback",
        "score_gradients",
        "sum_slices",
    ]


@pytest.fixture(
    params=[
        # A missing barrier shows in one of them.
        pytest.param("threads in order", marks=NEEDS_COMPILER),
        pytest.param("threads in reverse", marks=NEEDS_COMPILER),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ],
    ids=lambda name: name.replace(" ", "-"),
)
def both(request, monkeypatch):
    """What a function of a space and arrays gives with the kernels, and what with plain code, as lists."""
    machine = CUPY if request.param == "gpu" else GPU_NUMPY

    def call(function, *arrays):
        results = []
        for with_kernels in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "usable", lambda x: with_kernels)  # noqa: B023 - called in this round
                if machine is GPU_NUMPY:
                    run_on_cpu(patch, descending=request.param == "threads in reverse")
                on_machine = [None if x is None else machine.array(x.copy()) for x in arrays]
                result = function(device.space_of(on_machine[0]), *on_machine)
            results.append([machine.numpy(x) for x in (result if isinstance(result, tuple) else (result,))])
        assert [(x.shape, x.dtype) for x in results[0]] == [(x.shape, x.dtype) for x in results[1]]
        return results

    return call


def assert_near(got, want, limit):
    """Entry by entry, relative to each; NaN and infinity where they should be."""
    np.testing.assert_allclose(got, want, rtol=limit, atol=np.finfo(want.dtype).tiny)


TOKENS = pytest.mark.parametrize(
    ("d", "degree", "batch", "tokens"),
    [
        (1, 4, (), 1000),
        (5, 1, (2,), 31),
        (5, 4, (2, 3), 33),
        (16, 2, (), 1000),
        (16, 3, (3,), 31),
        (64, 1, (2,), 33),
        (64, 2, (2,), 31),
        (64, 3, (), 1),  # many slices of monomials
        (256, 2, (), 3),  # too many coordinates for shared memory
        (7000, 1, (2,), 2),
        (2, 2, (70_000,), 1),  # more than the second number of a grid may be
        (3, 2, (2, 0), 5),
        (3, 2, (2,), 0),
        (2, 9, (), 5),  # a degree that the loop over monomials is not unrolled for
    ],
)


@TOKENS
def test_monomials_have_the_bits_of_plain_code(d, degree, batch, tokens, both, dtype, rng):
    x = rng.standard_normal((*batch, d, tokens)).astype(dtype)
    (got,), (want,) = both(lambda sp, x: monomials.monomials(d, degree).features(sp, x, degree), x)
    assert got.shape == (*batch, monomials.rank(d, degree), tokens)
    assert np.array_equal(got, want)


@TOKENS
def test_pullbacks_are_those_of_plain_code(d, degree, batch, tokens, both, dtype, rng):
    x = rng.standard_normal((*batch, d, tokens)).astype(dtype)
    u = rng.standard_normal((*batch, monomials.rank(d, degree), tokens)).astype(dtype)
    (got,), (want,) = both(lambda sp, x, u: monomials.monomials(d, degree).pullback(sp, x, u, degree), x, u)
    assert got.shape == x.shape
    assert relative_error(got, want) <= REORDERED[dtype]


def test_lower_degrees_of_the_same_monomials(both, dtype, rng):
    x = rng.standard_normal((2, 5, 9)).astype(dtype)
    u = rng.standard_normal((2, monomials.rank(5, 2), 9)).astype(dtype)

    def run(sp, x, u):
        return monomials.Monomials(5, 4).features(sp, x, 2), monomials.Monomials(5, 4).pullback(sp, x, u, 2)

    got, want = both(run, x, u)
    assert np.array_equal(got[0], want[0])
    assert relative_error(got[1], want[1]) <= REORDERED[dtype]


def test_monomials_of_views(both, dtype, rng):
    x = rng.standard_normal((2, 40, 6)).astype(dtype)
    u = rng.standard_normal((2, 40, monomials.rank(3, 2))).astype(dtype)

    def run(sp, x, u):
        x, u = sp.xp.matrix_transpose(x)[..., ::2, ::3], sp.xp.matrix_transpose(u)[..., ::3]
        of_d = monomials.monomials(3, 2)
        return of_d.features(sp, x, 2), of_d.pullback(sp, x, u, 2)

    got, want = both(run, x, u)
    assert np.array_equal(got[0], want[0])
    assert relative_error(got[1], want[1]) <= REORDERED[dtype]


def test_a_nan_stays_with_its_token(both, dtype, rng):
    x = rng.standard_normal((2, 5, 40)).astype(dtype)
    u = rng.standard_normal((2, monomials.rank(5, 3), 40)).astype(dtype)
    x[1, 2, 7], u[0, 11, 3] = np.nan, np.nan

    def run(sp, x, u):
        return monomials.monomials(5, 3).features(sp, x, 3), monomials.monomials(5, 3).pullback(sp, x, u, 3)

    got, want = both(run, x, u)
    assert np.array_equal(got[0], want[0], equal_nan=True)
    assert np.array_equal(np.isnan(got[1]), np.isnan(want[1]))
    assert set(np.argwhere(np.isnan(got[1]).any(axis=1)).flatten().tolist()) == {0, 1, 3, 7}


def scores(rng, dtype, batch, blocks, rows, keys):
    """Scores and the rest that `exponentials` takes; some rows see nothing, some keys are removed."""
    s = 3 * rng.standard_normal((batch, blocks, rows, keys))
    most = rng.standard_normal((batch, blocks, rows))
    most[:, :, ::2] = -np.inf
    bias = rng.standard_normal((batch, blocks, keys))
    bias[..., ::3] = -np.inf
    first = rng.integers(0, keys + 1, (blocks, rows))
    last = rng.integers(0, keys + 1, (blocks, rows))
    return [x.astype(dtype) for x in (s, most, bias)] + [x.astype(np.int32) for x in (first, last)]


SHAPES = pytest.mark.parametrize(
    ("batch", "blocks", "rows", "keys"),
    [
        (2, 3, 5, 1),
        (1, 1, 1, 31),
        (2, 3, 5, 33),
        (1, 2, 9, 256),
        (3, 2, 5, 257),
        (2, 1, 3, 1000),
        (1, 2, 1, 9000),  # more than a block keeps in registers
        (0, 2, 3, 4),
    ],
)
GIVEN = pytest.mark.parametrize("given", ["nothing", "bias", "mask", "bias and mask"])


def given_of(given, bias, first, last):
    return (bias if "bias" in given else None, *((first, last) if "mask" in given else (None, None)))


@GIVEN
@SHAPES
def test_exponentials_are_those_of_plain_code(batch, blocks, rows, keys, given, both, dtype, rng):
    s, most, bias, first, last = scores(rng, dtype, batch, blocks, rows, keys)
    got, want = both(tiles.exponentials, s, most, *given_of(given, bias, first, last))
    assert_near(got[0], want[0], KERNEL[dtype])
    assert np.array_equal(got[1], want[1])
    assert_near(got[2], want[2], KERNEL_SUMS[dtype])


def test_rows_that_see_nothing_have_no_weights(both, dtype, rng):
    s, most, *_ = scores(rng, dtype, 2, 1, 3, 50)
    most[...] = -np.inf
    first, last = np.array([[0, 20, 50]], np.int32), np.array([[50, 20, 50]], np.int32)
    (weights, most, sums), _ = both(tiles.exponentials, s, most, None, first, last)
    assert (weights[:, :, 1:] == 0).all()
    assert (most[:, :, 1:] == 0).all()
    assert (sums[:, :, 1:] == 0).all()
    assert (sums[:, :, 0] >= 1).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("keys", [40, 1000, 9000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_never_lost(value, keys, both, dtype, rng):
    s, most, _, first, last = scores(rng, dtype, 1, 1, 6, keys)
    first[...], last[...] = 1, keys
    s[0, 0, 0, 0] = value  # which the row does not see
    for row, key in ((1, 1), (2, 35), (3, keys - 1)):
        s[0, 0, row, key] = value
    most[0, 0, 4] = value
    got, want = both(tiles.exponentials, s, most, None, first, last)
    assert_near(got[0], want[0], KERNEL[dtype])
    assert np.array_equal(got[1], want[1], equal_nan=True)
    assert_near(got[2], want[2], KERNEL_SUMS[dtype])
    assert np.isfinite(got[2][0, 0]).tolist() == [True, False, False, False, np.isinf(value), True]


@GIVEN
@SHAPES
def test_score_gradients_are_those_of_plain_code(batch, blocks, rows, keys, given, both, dtype, rng):
    s, most, bias, first, last = scores(rng, dtype, batch, blocks, rows, keys)
    most[most == -np.inf] = 0
    e = rng.standard_normal(s.shape).astype(dtype)
    scale, delta = (rng.standard_normal(most.shape).astype(dtype) for _ in range(2))
    masks = given_of(given, bias, first, last)
    got, want = both(tiles.score_gradients, s, e, most, scale, delta, *masks)
    assert_near(got[0], want[0], KERNEL[dtype])
    assert_near(got[1], want[1], KERNEL[dtype])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_overflows_in_the_products_with_removed_keys_is_not_seen(value, both, dtype, rng):
    s, most, bias, first, last = scores(rng, dtype, 2, 3, 5, 33)
    e = rng.standard_normal(s.shape).astype(dtype)
    for x in (s, e):
        x[..., ::3] = value
    most[most == -np.inf] = 0
    got, want = both(tiles.exponentials, s, most, bias, first, last)
    assert all(np.isfinite(x).all() for x in (*got, *want))
    got, want = both(tiles.score_gradients, s, e, most, most, most, bias, first, last)
    for x in (*got, *want):
        assert np.isfinite(x).all()
        assert (x[..., ::3] == 0).all()


@SHAPES
def test_gaussians_are_those_of_plain_code(batch, blocks, rows, keys, both, dtype, rng):
    products = rng.standard_normal((batch, blocks, rows, keys)).astype(dtype)
    offsets = rng.standard_normal((batch, rows)).astype(dtype)
    norms = rng.standard_normal((batch, blocks, keys)).astype(dtype)
    norms[..., ::7] = np.nan
    (got,), (want,) = both(tiles.gaussian, products, offsets, norms)
    assert_near(got, want, KERNEL[dtype])
    assert np.nanmax(got, initial=0) <= 1
    assert np.array_equal(np.isnan(got), np.broadcast_to(np.isnan(norms)[:, :, None], got.shape))


def test_tiles_of_views_and_broadcast_arrays(both, dtype, rng):
    s, most, bias, first, last = scores(rng, dtype, 4, 2, 3, 80)
    most[most == -np.inf] = 0

    def run(sp, s, most, bias, first, last):
        e, s = s[1::2, ..., ::2], s[::2, ..., ::2]
        most, bias = sp.xp.broadcast_to(most[:1], (2, 2, 3)), bias[:1, :1, ::2]
        copies = [sp.xp.asarray(x, copy=True) for x in (s, s, e)]  # of what the kernels write over
        exponentials = tiles.exponentials(sp, s, most, bias, first[:1], last[:1])
        gradients = tiles.score_gradients(sp, copies[0], e, most, most, most, bias, first[:1], last[:1])
        return *exponentials, *gradients, tiles.gaussian(sp, copies[1], most[0, :1], copies[2][:, :1, 0])

    for x, y in zip(*both(run, s, most, bias, first, last), strict=True):
        assert_near(x, y, KERNEL_SUMS[dtype])


@NEEDS_COMPILER
def test_the_order_of_threads_changes_no_bit(monkeypatch, dtype, rng):
    x = rng.standard_normal((40, 70)).astype(dtype)
    u = rng.standard_normal((monomials.rank(40, 2), 70)).astype(dtype)
    s, most, bias, first, last = scores(rng, dtype, 1, 2, 3, 1000)
    results = []
    for descending in (False, True):
        run_on_cpu(monkeypatch, descending=descending)
        dx = kernels.monomial_pullback(x, u, monomials.monomials(40, 2).coordinates)
        results.append((dx, *kernels.exponentials(s.copy(), most, bias, first, last)))
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@NEEDS_COMPILER
def test_results_take_the_place_of_scores(monkeypatch, dtype, rng):
    s, most, *_ = scores(rng, dtype, 1, 1, 3, 40)
    run_on_cpu(monkeypatch)
    assert kernels.exponentials(s, most, None, None, None)[0] is s
    f, ds = kernels.score_gradients(s, e := s.copy(), most, most, most, None, None, None)
    assert f is s
    assert ds is e
    assert kernels.gaussian(s, most[0], s[:, :, 0].copy()) is s


def without_memory(*shape):
    return np.broadcast_to(np.float64(0), shape)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2**31 - 1), (70_000, 1000, 20, 1), (1, 1, 1, 1), (2**15, 2**15, 1, 5000)])
def test_grids_of_rows_are_within_limits(shape):
    x = without_memory(*shape)
    grid, block = kernels._by_rows(x)
    cuda_on_cpu.check_limits(grid, block, 0)
    assert grid[0] * block[1] >= x.size // shape[-1]


@pytest.mark.parametrize("shape", [(1, 1), (2**20, 3, 5000), (70_000, 64, 100), (5, 256, 1), (10_000, 1)])
@pytest.mark.parametrize("r", [1, 10, 50_000, 10**9])
@pytest.mark.parametrize("arrays", [1, 2])
def test_grids_of_tokens_are_within_limits_and_cover_the_monomials(arrays, r, shape):
    x = without_memory(*shape)
    block, shared, slices, slice_ = kernels._by_tokens(x, r, arrays)
    cuda_on_cpu.check_limits(kernels._blocks(x.size // shape[-2], block, slices), block, shared)
    assert (slices - 1) * slice_ < r <= slices * slice_


@pytest.mark.parametrize("gpu", [ON_CUPY], ids=["gpu"])
def test_tables_are_copied_once_and_can_be_let_go(gpu):
    x, coordinates = gpu.array(np.zeros((3, 4))), monomials.monomials(3, 2).coordinates
    table = kernels._table(x, coordinates)
    assert np.array_equal(gpu.numpy(table), coordinates)
    assert kernels._table(x, coordinates) is table
    kernels.forget_tables(select.cupy())
    assert kernels._table(x, coordinates) is not table
