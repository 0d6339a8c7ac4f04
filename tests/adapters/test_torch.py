"""Attention of PyTorch's tensors: its own attention's results, under all that PyTorch does with a function."""

import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import relative_error

torch = pytest.importorskip("torch", reason="PyTorch is not installed, which the tests do not require")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, which the tests do not require")

from torch.autograd import forward_ad  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap  # noqa: E402

import lingrad_rs as lg  # noqa: E402
import lingrad_rs.torch as lgt  # noqa: E402
from lingrad_rs.torch import engines, ops  # noqa: E402

attend = lgt.scaled_dot_product_attention
reference = torch.nn.functional.scaled_dot_product_attention

pytestmark = [
    # Of PyTorch's own parts, when they are used as documented.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(20240813)
    torch._dynamo.reset()


def draw(*, n=7, m=None, h=4, h_kv=None, batch=(2,), d=5, dv=3, dtype=torch.float64, requires_grad=True):
    m, h_kv = n if m is None else m, h if h_kv is None else h_kv
    shapes = (*batch, h, n, d), (*batch, h_kv, m, d), (*batch, h_kv, m, dv)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def with_gradients(function, leaves, dout=None):
    out = function(*leaves)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape) if dout is None else dout
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(with_gradients(ours, leaves), with_gradients(theirs, leaves))


def samples_of_pytorch(dtype):
    internal = "torch.testing._internal.common_methods_invocations"
    op_db = pytest.importorskip(internal, reason="this PyTorch comes without its samples").op_db
    op = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return [x for x in op.sample_inputs("cpu", dtype, requires_grad=True) if not x.kwargs.get("dropout_p")]


# PyTorch's samples hold numbers up to 9, and scores up to 200, by which gradients are differences that cancel, in its
# own float64 too. A tenth of these numbers leaves rounding alone; half precision rounds out, from which gradients are
# made.
SIZE = 0.1
SAMPLES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


@pytest.mark.parametrize("dtype", SAMPLES.keys(), ids=str)
def test_pytorch_s_own_samples_give_its_results_in_float64(dtype):
    samples, limit = samples_of_pytorch(torch.float64), SAMPLES[dtype]
    for sample in samples:
        options = {name: x for name, x in sample.kwargs.items() if name not in ("dropout_p", "attn_mask")}
        mask = sample.kwargs.get("attn_mask")
        tensors = [sample.input, *sample.args, *([] if mask is None or mask.dtype is torch.bool else [mask])]
        if mask is not None and mask.dtype is torch.bool:
            options["attn_mask"] = mask
        leaves = [(SIZE * x.detach()).to(dtype).requires_grad_() for x in tensors]
        got = with_gradients(lambda *x, o=options: attend(*x, **o), leaves)
        want = with_gradients(
            lambda *x, o=options: reference(*x, **o), [x.detach().double().requires_grad_() for x in leaves]
        )
        for x, y in zip(got, want, strict=True):
            assert x.dtype is dtype
            assert relative_error(x.double(), y) <= limit
    print(f"{len(samples)} samples of PyTorch in {dtype}")
    assert len(samples) >= 10


MASKS = {
    "bool": lambda: torch.rand(2, 4, 7, 9) > 0.3,
    "bool, of all heads": lambda: torch.rand(2, 1, 7, 9) > 0.3,
    "bool, of all batches": lambda: torch.rand(7, 9) > 0.3,
    "bool, of keys": lambda: torch.rand(2, 1, 1, 9) > 0.3,
    "bool, one for all": lambda: torch.ones(1, 1, dtype=torch.bool),
    "bool, rows of nothing": lambda: (torch.rand(7, 9) > 0.3) & (torch.arange(7) % 2 == 0)[:, None],
    "nothing at all": lambda: torch.zeros(7, 9, dtype=torch.bool),
    "float": lambda: torch.randn(2, 4, 7, 9, dtype=torch.float64, requires_grad=True),
    "float, of a head": lambda: torch.randn(4, 1, 9, dtype=torch.float64, requires_grad=True),
    "float, of keys": lambda: torch.randn(2, 1, 1, 9, dtype=torch.float64, requires_grad=True),
    "float, with -inf": lambda: torch.zeros(7, 9, dtype=torch.float64).masked_fill(torch.rand(7, 9) > 0.5, -torch.inf),
    "expanded": lambda: (torch.rand(7, 9) > 0.3).expand(2, 4, 7, 9),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
def test_a_mask_means_what_it_means_to_pytorch(make):
    leaves, mask = draw(n=7, m=9), make()
    if mask.requires_grad:
        leaves.append(mask)
        assert_same(attend, reference, leaves)
    else:
        assert_same(lambda *x: attend(*x, mask), lambda *x: reference(*x, mask), leaves)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5), (1, 6)])
def test_is_causal_counts_from_the_first_key_as_pytorch_does(n, m):
    leaves = draw(n=n, m=m)
    assert_same(lambda *x: attend(*x, is_causal=True), lambda *x: reference(*x, is_causal=True), leaves)


SHAPES = {
    "one head": ((7, 5), (9, 5), (9, 3)),
    "three axes": ((4, 7, 5), (4, 9, 5), (4, 9, 3)),
    "five axes": ((2, 3, 4, 7, 5), (2, 3, 4, 9, 5), (2, 3, 4, 9, 3)),
    "keys of one batch": ((3, 4, 7, 5), (1, 4, 9, 5), (1, 4, 9, 3)),
    "queries of one batch": ((1, 4, 7, 5), (3, 4, 9, 5), (3, 4, 9, 3)),
    "values of one batch": ((3, 4, 7, 5), (3, 4, 9, 5), (1, 4, 9, 3)),
    "keys of one head": ((3, 4, 7, 5), (3, 1, 9, 5), (3, 1, 9, 3)),
    "queries of one head": ((3, 1, 7, 5), (3, 4, 9, 5), (3, 4, 9, 3)),
    "batches in turn": ((3, 1, 4, 7, 5), (1, 2, 4, 9, 5), (1, 2, 4, 9, 3)),
    "no queries": ((2, 4, 0, 5), (2, 4, 9, 5), (2, 4, 9, 3)),
    "no batch": ((0, 4, 7, 5), (0, 4, 9, 5), (0, 4, 9, 3)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_leading_axes_broadcast_as_in_pytorch(shapes):
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert_same(attend, reference, leaves)


def test_rows_without_keys_are_zero_and_so_are_gradients():
    leaves = draw(n=7, m=0)
    out, *grads = with_gradients(attend, leaves)
    assert out.shape == (2, 4, 7, 3)
    assert not out.any()
    assert all(not x.any() and x.shape == leaf.shape for x, leaf in zip(grads, leaves, strict=True))
    with pytest.raises(lg.DenominatorError, match="no keys"):
        lgt.attention(*leaves)


@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_grouped_queries_read_the_key_heads_that_pytorch_s_read(h_kv):
    leaves = draw(h=4, h_kv=h_kv)
    assert_same(lambda *x: attend(*x, enable_gqa=True), lambda *x: reference(*x, enable_gqa=True), leaves)


def test_any_strides_are_read_where_they_lie(monkeypatch):
    q, k, v = (torch.randn(2, 7, 4, 6, dtype=torch.float64).transpose(1, 2)[..., ::2] for _ in range(3))
    mask = (torch.rand(7, 7) > 0.3).expand(2, 4, 7, 7)
    seen, attention = [], lg.attention

    def look(*arrays, **options):
        seen.append((*arrays, options["mask"]))
        return attention(*arrays, **options)

    monkeypatch.setattr(lg, "attention", look)
    torch.testing.assert_close(attend(q, k, v, mask), reference(q, k, v, mask))
    for tensor, array in zip((q, k, v, mask), seen[0], strict=True):
        assert array.ctypes.data == tensor.data_ptr()
        assert array.strides == tuple(step * tensor.element_size() for step in tensor.stride())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_where_it_lies(dtype, monkeypatch):
    x = torch.randn(2, 4, 7, 6).to(dtype)
    seen, attention = [], lg.attention
    monkeypatch.setattr(lg, "attention", lambda *a, **o: seen.extend(a) or attention(*a, **o))
    assert attend(x, x, x).dtype is dtype
    assert {array.ctypes.data for array in seen} == {x.data_ptr()}
    assert str(seen[0].dtype) == str(dtype).removeprefix("torch.")


def test_signs_that_are_yet_to_be_changed_are_changed():
    x = torch.randn(2, 4, 7, 5, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(attend(x, x, x), reference(x, x, x))


def test_inference_mode_is_served():
    x = draw(requires_grad=False)
    with torch.inference_mode():
        torch.testing.assert_close(attend(*x), reference(*x))


def test_only_what_requires_a_gradient_has_one():
    q, k, v = draw(requires_grad=False)
    k.requires_grad_()
    (dk,) = torch.autograd.grad(attend(q, k, v).sin().sum(), k)
    torch.testing.assert_close(dk, torch.autograd.grad(reference(q, k, v).sin().sum(), k)[0])
    assert not attend(q, q, q).requires_grad


OPTIONS = {
    "nothing": dict,
    "causal, of a cache": lambda: {"causal": True, "query_offset": 2},
    "window": lambda: {"window": (3, 1), "query_offset": 1},
    "key bias": lambda: {"key_bias": torch.randn(2, 1, 9, dtype=torch.float64, requires_grad=True)},
    "key bias of key heads": lambda: {"key_bias": torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True)},
    "key bias of all": lambda: {"key_bias": torch.randn(9, dtype=torch.float64, requires_grad=True)},
    "bias": lambda: {"bias": torch.randn(4, 1, 9, dtype=torch.float64, requires_grad=True)},
    "softcap": lambda: {"softcap": 1.5},
    "sinks": lambda: {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)},
    "many": lambda: {
        "causal": True,
        "query_offset": 2,
        "window": (4, None),
        "softcap": 2.0,
        "bias": torch.randn(7, 9, dtype=torch.float64, requires_grad=True),
        "key_bias": torch.randn(2, 9, dtype=torch.float64, requires_grad=True),
        "mask": torch.rand(7, 9) > 0.1,
        "sinks": torch.randn(4, dtype=torch.float64, requires_grad=True),
        "empty_rows": "zero",
    },
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_are_those_of_central_differences(make):
    options = make()
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves = [*draw(n=7, m=9, h_kv=2), *(options[name] for name in names)]

    def both(q, k, v, *biases):
        out, lse = lgt.attention(q, k, v, return_lse=True, **(options | dict(zip(names, biases, strict=True))))
        # Rows without a key have an lse of -inf; of what is left, the gradient is asked for too.
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(both, leaves)


def test_segments_see_only_themselves():
    q, k, v = draw(n=8)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2, 2]])
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(8, 8, dtype=torch.bool).tril()
    assert_same(lambda *x: lgt.attention(*x, segment_ids=ids, causal=True), lambda *x: reference(*x, mask), [q, k, v])


def arguments_of_operator(options):
    q, k, v = draw(n=7, m=9, h_kv=2)
    plain = [engines.EXACT, True, None, 2, 4, None, 2.0 if options else None, True]
    tensors = [None] * 5
    if options:
        tensors = [
            torch.randn(2, 1, 9, dtype=torch.float64, requires_grad=True),
            None,
            torch.rand(7, 9) > 0.2,
            torch.randn(4, 7, 9, dtype=torch.float64, requires_grad=True),
            torch.randn(4, dtype=torch.float64, requires_grad=True),
        ]
    return (q, k, v, *plain, *tensors)


@pytest.mark.parametrize("options", [False, True])
def test_the_operators_pass_pytorch_s_own_checks(options):
    args = arguments_of_operator(options)
    torch.library.opcheck(torch.ops.lingrad_rs.attention.default, args)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = ops.attention(*args)
    backward = torch.ops.lingrad_rs.attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), *args[:3], out, lse, *args[3:]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_it_gives_the_same(backend):
    leaves = [*draw(), torch.randn(4, 7, 7, dtype=torch.float64, requires_grad=True)]
    try:
        compiled = torch.compile(lambda *x: attend(*x).sin(), fullgraph=True, backend=backend)
        got = with_gradients(compiled, leaves)
    except Exception as error:
        if "compiler" in str(error).lower() and backend == "inductor":
            pytest.skip("inductor finds no C++ compiler")
        raise
    torch.testing.assert_close(got, with_gradients(lambda *x: reference(*x).sin(), leaves))


@pytest.mark.parametrize("engine", [lg.Polynomial(degree=4), lg.Auto(1e-3), lg.Landmark(64), lg.Exact()], ids=repr)
def test_an_engine_survives_being_compiled_and_being_text(engine, monkeypatch):
    seen, attention = [], lg.attention

    def look(*arrays, **options):
        seen.append(options["engine"])
        return attention(*arrays, **(options | {"engine": lg.Exact()}))

    monkeypatch.setattr(lg, "attention", look)
    x = draw(requires_grad=False)
    attend(*x, engine=engine)
    torch.compile(lambda *x: attend(*x, engine=engine), fullgraph=True, backend="eager")(*x)
    torch.compile(lambda e, *x: attend(*x, engine=e), fullgraph=True, backend="eager")(engine, *x)
    torch.compile(lambda *x: attend(*x, engine=lg.Polynomial(degree=6)), fullgraph=True, backend="eager")(*x)
    assert seen == [engine] * 3 + [lg.Polynomial(degree=6)]


def test_constants_of_landmarks_survive_being_text():
    constants = lg.LandmarkConstants(0.5, np.ones(2), np.zeros(2), 1.5, np.arange(6.0).reshape(3, 2), np.eye(3) / 3)
    engine = lg.Landmark(constants=constants)
    assert engines.engine_from_text(engines.text_of_engine(engine, None)) == engine


def test_one_graph_serves_every_length():
    graphs = []
    f = torch.compile(
        lambda *x: attend(*x, is_causal=True),
        fullgraph=True,
        dynamic=True,
        backend=lambda gm, inputs: graphs.append(gm) or gm,
    )
    for n in (8, 9, 12, 17):  # no other axis is as long
        x = draw(n=n, m=n + 1, requires_grad=False)
        torch.testing.assert_close(f(*x), reference(*x, is_causal=True))
    assert len(graphs) == 1


class Module(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return attend(q, k, v, mask)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_serves_other_lengths(strict):
    n = torch.export.Dim("n", min=2, max=100)
    lengths = {2: n}, {2: n}, {2: n}, {2: n, 3: n}
    mask = torch.rand(2, 1, 7, 7) > 0.3
    x = draw(requires_grad=False)
    exported = torch.export.export(Module(), (*x, mask), dynamic_shapes=lengths, strict=strict)
    x, mask = draw(n=11, requires_grad=False), torch.rand(2, 1, 11, 11) > 0.3
    torch.testing.assert_close(exported.module()(*x, mask), reference(*x, mask))
    names = {str(node.target) for node in exported.graph.nodes}
    assert "lingrad_rs.attention.default" in names


def test_tensors_without_numbers_have_the_right_shapes():
    x = [x.to("meta") for x in draw(requires_grad=False)]
    assert attend(*x).shape == (2, 4, 7, 3)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert attend(*(torch.empty(2, 4, 7, 5) for _ in range(3))).shape == (2, 4, 7, 5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_has_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    leaves = draw()
    checkpoint(attend, *leaves, use_reentrant=reentrant).sin().sum().backward()
    want = torch.autograd.grad(reference(*leaves).sin().sum(), leaves)
    torch.testing.assert_close([x.grad for x in leaves], list(want))


def test_functional_gradients_are_those_of_pytorch():
    x = draw(requires_grad=False)

    def gradients(function):
        return grad(lambda *x: function(*x).sin().sum(), argnums=(0, 1, 2))(*x)

    torch.testing.assert_close(gradients(attend), gradients(reference))


def test_a_jacobian_is_that_of_pytorch():
    q, k, v = draw(n=3, h=2, requires_grad=False)
    torch.testing.assert_close(jacrev(lambda q: attend(q, k, v))(q), jacrev(lambda q: reference(q, k, v))(q))
    leaf = q.requires_grad_()
    douts = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64)
    batched = torch.autograd.grad(attend(leaf, k, v), leaf, douts, is_grads_batched=True)[0]
    one_by_one = torch.stack([torch.autograd.grad(attend(leaf, k, v), leaf, dout)[0] for dout in douts])
    torch.testing.assert_close(batched, one_by_one)


VMAPS = {
    "all": ((0, 0, 0, None), None),
    "queries": ((0, None, None, None), None),
    "keys, of another axis": ((None, 2, None, None), None),
    "masks": ((None, None, None, 1), lambda: torch.rand(7, 3, 7) > 0.3),
    "masks and all": ((1, 0, 0, 0), lambda: torch.rand(3, 7, 7) > 0.3),
    "biases": ((0, None, 0, 0), lambda: torch.randn(3, 4, 7, 7, dtype=torch.float64)),
    "one bias": ((0, 0, 0, None), lambda: torch.randn(4, 7, 7, dtype=torch.float64)),
    "biases alone": ((None, None, None, 0), lambda: torch.randn(3, 7, 7, dtype=torch.float64)),
}


@pytest.mark.parametrize(("dims", "make"), VMAPS.values(), ids=VMAPS.keys())
def test_vmap_is_a_loop_and_so_are_its_gradients(dims, make):
    tensors = [x if dim is None else torch.stack([x, 2 * x, -x], dim=dim) for x, dim in zip(draw(), dims, strict=False)]
    tensors = [x.detach() for x in tensors]
    mask = None if make is None else make()
    argnums = (0, 1, 2, 3) if mask is not None and mask.is_floating_point() else (0, 1, 2)
    for function in (attend, grad(lambda *x: attend(*x).sin().sum(), argnums=argnums)):
        got = vmap(function, in_dims=dims)(*tensors, mask)
        want = [
            function(*(x if dim is None else x.select(dim, i) for x, dim in zip((*tensors, mask), dims, strict=True)))
            for i in range(3)
        ]
        want = tuple(map(torch.stack, zip(*want, strict=True))) if isinstance(want[0], tuple) else torch.stack(want)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_sinks_is_a_loop(dims):
    q, k, v = draw(requires_grad=False)
    sinks = torch.randn(4, dtype=torch.float64)
    q, sinks = (x if dim is None else torch.stack([x, 2 * x, -x]) for x, dim in zip((q, sinks), dims, strict=True))
    function = grad(lambda q, sinks: lgt.attention(q, k, v, sinks=sinks).sin().sum(), argnums=(0, 1))
    got = vmap(function, in_dims=dims)(q, sinks)
    want = [function(q if dims[0] is None else q[i], sinks if dims[1] is None else sinks[i]) for i in range(3)]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*want, strict=True))))


def in_dual_level(q, k, v):
    with forward_ad.dual_level():
        attend(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


FORWARD_MODE = {
    "dual numbers": in_dual_level,
    "jvp": lambda q, k, v: jvp(lambda q: attend(q, k, v), (q,), (q,)),
    "of values": lambda q, k, v: jvp(lambda v: attend(q, k, v), (v,), (v,)),
    "of a bias": lambda q, k, v: jvp(lambda b: attend(q, k, v, b), (q[0, 0, :, :1],), (q[0, 0, :, :1],)),
    "of sinks": lambda q, k, v: jvp(lambda s: lgt.attention(q, k, v, sinks=s), (q[0, :, 0, 0],), (q[0, :, 0, 0],)),
    "jvp of vmap": lambda q, k, v: jvp(lambda q: vmap(attend)(q, k, v), (q,), (q,)),
    "vmap of jvp": lambda q, k, v: vmap(lambda q, k, v: jvp(lambda q: attend(q, k, v), (q,), (q,)))(q, k, v),
    "jacfwd": lambda q, k, v: jacfwd(lambda q: attend(q, k, v))(q),
    "hessian": lambda q, k, v: hessian(lambda q: attend(q, k, v).sum())(q),
}


@pytest.mark.parametrize("call", FORWARD_MODE.values(), ids=FORWARD_MODE.keys())
def test_forward_mode_is_refused_and_never_zero(call):
    with pytest.raises(lg.ArgumentError, match="forward-mode"):
        call(*draw(requires_grad=False))


def double_backward(q, k, v):
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attend(q, k, v).sin().sum(), q, create_graph=True)
    dq.sum().backward()


SECOND = {
    "create_graph": double_backward,
    "grad of grad": lambda q, k, v: grad(lambda q: grad(lambda q: attend(q, k, v).sin().sum())(q).sum())(q),
    "jacrev of grad": lambda q, k, v: jacrev(grad(lambda q: attend(q, k, v).sin().sum()))(q),
}


@pytest.mark.parametrize("call", SECOND.values(), ids=SECOND.keys())
def test_second_derivatives_are_refused(call):
    with pytest.raises(lg.ArgumentError, match="differentiated again"):
        call(*draw(requires_grad=False))


@pytest.mark.parametrize("changed", ["query", "out"])
def test_a_change_in_place_is_noticed(changed):
    q, k, v = draw()
    q = q * 1
    out = attend(q, k, v)
    loss = out.sum()
    (q if changed == "query" else out).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_goes_through_to_gradients(value):
    leaves = draw(dtype=torch.float32)
    dout = torch.ones(2, 4, 7, 3)
    dout[0, 1, 2, 0] = value
    grads = torch.autograd.grad(attend(*leaves), leaves, dout)
    assert all(not x[0, 1].isfinite().all() for x in grads)
    assert all(x[1].isfinite().all() for x in grads)


def test_a_scaler_of_losses_skips_a_step_that_overflows():
    leaf = torch.nn.Parameter(torch.randn(1, 2, 7, 5))
    optimizer = torch.optim.SGD([leaf], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = leaf.detach().clone()
    scaler.scale(attend(leaf, leaf, leaf).square().sum() * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(leaf, before)
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_it_does_for_pytorch_s_own(dtype):
    q, k, v = draw(dtype=torch.float32)
    mask = torch.randn(7, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = attend(q, k.to(dtype), v, mask)
        want = reference(q, k.to(dtype), v, mask)
        wide = attend(*draw(dtype=torch.float64))
    assert out.dtype is want.dtype is dtype
    assert wide.dtype is torch.float64
    torch.testing.assert_close(out, want, rtol=0, atol=8 * torch.finfo(dtype).eps)
    out.sum().backward()
    assert q.grad.dtype is mask.grad.dtype is torch.float32


REFUSED = {
    "dropout": (lambda q, k, v: attend(q, k, v, dropout_p=0.1), lg.ArgumentError, "dropout_p is 0.1; expected 0.0"),
    "mask and causal": (
        lambda q, k, v: attend(q, k, v, torch.ones(7, 7, dtype=torch.bool), is_causal=True),
        lg.ArgumentError,
        "attn_mask and is_causal=True are both given",
    ),
    "two ways to choose": (
        lambda q, k, v: attend(q, k, v, engine=lg.Exact(), tol=1e-2),
        lg.ArgumentError,
        "tol is 0.01 and engine is Exact()",
    ),
    "no engine": (lambda q, k, v: attend(q, k, v, engine="exact"), lg.ArgumentError, "engine is 'exact'"),
    "no tolerance": (lambda q, k, v: attend(q, k, v, tol=2.0), lg.ToleranceError, "tol is 2.0"),
    "an array": (lambda q, k, v: attend(q, k.detach().numpy(), v), lg.DtypeError, "key is a numpy.ndarray"),
    "dtypes": (
        lambda q, k, v: attend(q, k.float(), v),
        lg.DtypeError,
        "key has dtype float32; expected float64 to match query",
    ),
    "integers": (lambda q, k, v: attend(q.int(), k.int(), v.int()), lg.DtypeError, "query has dtype int32"),
    "devices": (
        lambda q, k, v: attend(q, k, v.to("meta")),
        lg.DeviceError,
        "value is on meta; expected cpu to match query",
    ),
    "sparse": (lambda q, k, v: attend(q.to_sparse(), k, v), lg.DtypeError, "query has layout torch.sparse_coo"),
    "dtype of a mask": (
        lambda q, k, v: attend(q, k, v, torch.zeros(7, 7)),
        lg.DtypeError,
        "bias has dtype float32; expected float64",
    ),
    "shape of a mask": (
        lambda q, k, v: attend(q, k, v, torch.ones(7, 8, dtype=torch.bool)),
        lg.ShapeError,
        "mask has shape (7, 8); expected what broadcasts to (2, 4, 7, 7)",
    ),
    "widths": (lambda q, k, v: attend(q, k[..., :3], v), lg.ShapeError, "key has shape (2, 4, 7, 3); expected"),
    "lengths": (lambda q, k, v: attend(q, k, v[:, :, :3]), lg.ShapeError, "value has shape (2, 4, 3, 3); expected"),
    "batches": (lambda q, k, v: attend(q, k[:1].expand(3, 4, 7, 5), v), lg.ShapeError, "key has shape"),
    "heads": (lambda q, k, v: attend(q, k[:, :2], v[:, :2]), lg.ShapeError, "with enable_gqa=True"),
    "heads of groups": (
        lambda q, k, v: attend(q, k[:, :3], v[:, :3], enable_gqa=True),
        lg.ShapeError,
        "key has 3 heads",
    ),
    "no offset": (
        lambda q, k, v: lgt.attention(q, k[:, :, :5], v[:, :, :5], causal=True),
        lg.ArgumentError,
        "query_offset is None with 7 queries and 5 keys",
    ),
    "sinks": (lambda q, k, v: lgt.attention(q, k, v, sinks=q[0, 0, 0]), lg.ShapeError, "sinks has shape (5,)"),
    "segments": (
        lambda q, k, v: lgt.attention(q, k, v, segment_ids=torch.ones(7)),
        lg.DtypeError,
        "segment_ids has dtype float32; expected integers",
    ),
    "key bias": (
        lambda q, k, v: lgt.attention(q, k, v, key_bias=torch.ones(3, 7, dtype=torch.bool)),
        lg.ShapeError,
        "key_bias has shape (3, 7)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_told_by_name(call, error, message):
    with pytest.raises(error) as caught:
        call(*draw())
    assert message in str(caught.value)


def test_bfloat16_without_ml_dtypes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x = torch.ones(1, 2, 2, dtype=torch.bfloat16)
    with pytest.raises(lg.DtypeError, match=r"pip install 'lingrad_rs\[torch\]'"):
        attend(x, x, x)


def test_reports_tell_what_each_head_chose(monkeypatch):
    class Vjp:
        heads = ("a", "b")

    monkeypatch.setattr(lg, "attention_vjp", lambda *arrays, **options: (None, Vjp()))
    monkeypatch.setattr(lg, "attention", lambda *a, f=lg.attention, **o: f(*a, **(o | {"engine": lg.Exact()})))
    x, told = draw(requires_grad=False), []
    with lgt.reports(told.append) as heads:
        attend(*x, tol=1e-2)
        attend(*x)  # without a tolerance nothing was chosen
    attend(*x, tol=1e-2)
    assert heads == told == [("a", "b")]


def test_the_package_itself_never_imports_pytorch():
    code = "import sys, lingrad_rs; assert 'torch' not in sys.modules and 'lingrad_rs.torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overhead_is_printed(monkeypatch):
    """No test depends on the clock: this one tells what a call costs beyond `lingrad_rs.attention`."""
    x = torch.zeros(1, 1, 4, 8)
    out, lse = x.numpy(), x[..., 0].numpy()
    monkeypatch.setattr(lg, "attention", lambda *a, **o: (out.copy(), lse.copy()))

    def microseconds(function, calls=500):
        best = np.inf
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best = min(best, (time.perf_counter() - start) / calls)
        return best * 1e6

    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        print(f"without a gradient: {microseconds(lambda: attend(x, x, x)):.0f} us")
    print(f"with a gradient: {microseconds(lambda: attend(leaf, leaf, leaf)):.0f} us")
