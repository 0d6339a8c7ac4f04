"""The operator `Attention` of ONNX, by the cases that the onnx package itself generates: one call of the library each.

What ONNX prescribes, in this order: scores ``(sqrt(scale) q) . (sqrt(scale) k)``; softcap ``c tanh(s / c)``; then the
mask is added, where False and what is missing at its end are ``-inf``, as are keys that causality, the window or the
number of keys in a cache take out; softmax; rows without a key are 0. Query 0 stands at the number of keys before it:
the length of ``past_key``, or what of ``nonpad_kv_seqlen`` (one number a sequence) is more than the queries.
"""

import warnings
from collections import Counter

import numpy as np
import pytest

import lingrad_rs as lg

onnx = pytest.importorskip("onnx", reason="the onnx package is not installed, whose test cases these are")


def cases():
    """Of every case of one node: its name, the node and its arrays, by their names."""
    with warnings.catch_warnings():  # of the cases of other operators, all of which are made
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = [case for case in collect_testcases("Attention") if _is_one_node(case)]
    return found


def _is_one_node(case):
    """Expanded cases are the same arrays, with the operator written out in others: they say nothing of attention."""
    nodes = case.model.graph.node
    return len(nodes) == 1 and nodes[0].op_type == "Attention"


CASES = cases()


def heads_first(x, heads):
    """``(batch, tokens, heads * width)`` as ``(batch, heads, tokens, width)``: a view."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def call_of(inputs, attributes):
    """The arrays and options of the one call."""
    q = heads_first(inputs["Q"], attributes.get("q_num_heads"))
    k, v = (heads_first(inputs[name], attributes.get("kv_num_heads")) for name in "KV")
    past = inputs["past_key"].shape[2] if "past_key" in inputs else 0
    if past:
        k, v = (np.concatenate([inputs[f"past_{name}"], x], axis=2) for name, x in (("key", k), ("value", v)))
    n, m = q.shape[2], k.shape[2]
    options = {"engine": lg.Exact(), "empty_rows": "zero"}
    if "scale" in attributes:
        options["scale"] = attributes["scale"]
    if attributes.get("softcap", 0) > 0:
        options["softcap"] = attributes["softcap"]
    causal = bool(attributes.get("is_causal", 0))
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    window = tuple(None if side < 0 else side for side in sides)
    masks = []
    if "nonpad_kv_seqlen" in inputs:
        lengths = inputs["nonpad_kv_seqlen"]
        options["key_bias"] = np.arange(m) < lengths[:, None]
        if causal or window != (None, None):
            if len(set(lengths)) == 1 and -n <= lengths[0] - n <= m:
                options["query_offset"] = int(lengths[0]) - n
            else:  # each sequence has its own offset, and one call one: the mask says it
                masks.append(pairs(n, m, lengths - n, causal, window))
                causal, window = False, (None, None)
    elif causal or window != (None, None):
        options["query_offset"] = past
    if causal:
        options["causal"] = True
    if window != (None, None):
        options["window"] = window
    if "attn_mask" in inputs:
        given = inputs["attn_mask"]
        missing = [(0, 0)] * (given.ndim - 1) + [(0, m - given.shape[-1])]
        if given.dtype == bool:
            masks.append(np.pad(given, missing, constant_values=False))
        else:
            options["bias"] = np.pad(given, missing, constant_values=given.dtype.type(-np.inf))
    if masks:
        options["mask"] = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    return (q, k, v), options


def pairs(n, m, offsets, causal, window):
    """Which keys each query sees, ``(batch, 1, n, m)``."""
    place, key = np.arange(n)[:, None] + offsets[:, None, None, None], np.arange(m)
    left, right = window
    seen = np.full((len(offsets), 1, n, m), True)
    if causal:
        seen &= key <= place
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    return seen


def arrays_of(case):
    node = case.model.graph.node[0]
    ((given, wanted),) = case.data_sets
    inputs = dict(zip(filter(None, node.input), given, strict=True))
    outputs = dict(zip(filter(None, node.output), wanted, strict=True))
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    # Inputs have the names of the operator's in all of the cases; were it otherwise, something would be left out.
    assert inputs.keys() <= {"Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"}
    assert attributes.keys() <= READ | NOT_OF_Y
    return inputs, attributes, outputs


READ = {"is_causal", "scale", "softcap", "q_num_heads", "kv_num_heads", "left_window_size", "right_window_size"}
# What else is given out; and that softmax is to be in a wider dtype, which it always is.
NOT_OF_Y = {"qk_matmul_output_mode", "softmax_precision"}
# The cases ask for 1e-3, which is less than the distance of two numbers of bfloat16, up to 2**-7 of them. They round
# the weights to bfloat16 as well, where the library rounds the result alone: that is within two such distances.
BFLOAT16 = 2 * 2.0**-7


@pytest.mark.parametrize("case", CASES, ids=[case.name.removeprefix("test_attention_") for case in CASES])
def test_y_is_what_onnx_expects(case):
    inputs, attributes, outputs = arrays_of(case)
    arrays, options = call_of(inputs, attributes)
    for name, x in zip(("present_key", "present_value"), arrays[1:], strict=True):
        assert name not in outputs or np.array_equal(x, outputs[name])
    y = lg.attention(*arrays, **options)
    if inputs["Q"].ndim == 3:
        y = y.swapaxes(1, 2).reshape(*inputs["Q"].shape[:2], -1)
    want = outputs["Y"]
    assert (y.dtype, y.shape) == (want.dtype, want.shape)
    rtol = BFLOAT16 if want.dtype == "bfloat16" else case.rtol
    np.testing.assert_allclose(y.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=case.atol)


def test_there_are_cases_of_every_kind(capsys):
    """The operator's options that the cases have between them; and a count, to be seen with ``-s``."""
    used, dtypes = set(), Counter()
    for case in CASES:
        inputs, attributes, outputs = arrays_of(case)
        used |= inputs.keys() | attributes.keys()
        dtypes[str(outputs["Y"].dtype)] += 1
    with capsys.disabled():
        print(f"\nonnx {onnx.__version__}: {len(CASES)} cases of Attention: {dict(dtypes)}")
    assert len(CASES) >= 60
    assert used >= {"attn_mask", "past_key", "is_causal", "scale", "softcap", "q_num_heads"}
