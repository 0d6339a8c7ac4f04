"""``lingrad plan``: what it tells of heads in a file, its plot, and what it says of files that hold none."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributions import DISTRIBUTIONS, score_std
from limits import FLOAT32_MODEL, HANG_SECONDS, NOT_EXACT, SAME_MODEL, SAMPLED_STD

import lingrad_rs as lg

COMMAND = Path(sys.executable).with_name("lingrad" + (".exe" if sys.platform == "win32" else ""))
N, D = 4096, 16
QUICK = ("--rounds", "1")
FORWARD = ("--forward-only", *QUICK)
SMALL_SCORES, LARGE_SCORES = "isotropic, d 16, score std 0.3", "isotropic, d 16, score std 3"


def plan(*arguments):
    command = [COMMAND, "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


def result(*arguments):
    done = plan(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"machine", "causal", "gradients", "heads"}
    return found


def arrays(*names, n=N):
    """The drawn heads, (heads, n, d)."""
    heads = [DISTRIBUTIONS[name](np.random.default_rng(7), n) for name in names]
    return {c: np.stack([head[i] for head in heads]).astype(np.float32) for i, c in enumerate("qkv")}


@pytest.fixture
def two_heads(tmp_path):
    path = tmp_path / "heads.npz"
    np.savez(path, **arrays(SMALL_SCORES, LARGE_SCORES))
    return path


def test_gradients_of_every_head_are_timed_and_measured(two_heads):
    found = result(two_heads, *QUICK, "--tol", "3e-1", "--tol", "1e-3")
    assert found["causal"]
    assert found["gradients"]
    heads = found["heads"]
    assert [(head["layer"], head["head"], head["tokens"], head["d"]) for head in heads] == [(0, 0, N, D), (0, 1, N, D)]
    for head in heads:
        names = [trial["engine"] for trial in head["trials"]]
        # The closed form of degree 3 needs C(16 + 4, 4) = 4845 features, more than there are keys.
        landmarks = [f"{rank} landmarks" for rank in (32, 64, 128, 256)]
        assert names == ["exact", "degree 1", "degree 2", *landmarks]
        assert head["left_out"] == ["degree 3", "degree 4"]
        for trial in head["trials"]:
            if trial["failure"] is not None:
                assert trial["seconds"] is trial["relative_time"] is None
                assert trial["errors"] == {}
                assert trial["meets"] == []
                continue
            errors = trial["errors"].values()
            assert trial["errors"].keys() == {"out", "dq", "dk", "dv"}
            assert trial["relative_time"] == trial["seconds"] / head["trials"][0]["seconds"]
            assert all(error["low"] <= error["relative"] <= error["high"] for error in errors)
            highest = max(error["high"] for error in errors)
            if trial["engine"] == "exact":
                assert highest <= FLOAT32_MODEL
            else:
                assert highest >= NOT_EXACT
            assert trial["meets"] == [tol for tol in (3e-1, 1e-3) if highest <= tol]
        for choice, tol in zip(head["choices"], (3e-1, 1e-3), strict=True):
            assert choice["tol"] == tol
            assert choice["reason"]
            if choice["engine"] == "exact":
                assert choice["cost"] == 1
            else:
                assert 0 < choice["cost"] < 1
                assert max(error["high"] for error in choice["errors"].values()) <= tol
    small, large = heads
    assert small["choices"][0]["engine"] != "exact"
    assert {choice["engine"] for choice in large["choices"]} == {"exact"}


def test_the_statistics_are_those_of_the_scores(tmp_path):
    name = "large means, centred score std 1"
    drawn = arrays(name)
    np.savez(tmp_path / "heads.npz", **drawn)
    scores = result(tmp_path / "heads.npz", "--full", *FORWARD)["heads"][0]["scores"]
    q, k = (drawn[c][0].astype(np.float64) for c in "qk")
    assert scores["std"] == pytest.approx(score_std(q, k), rel=SAMPLED_STD)
    assert scores["centred_std"] == pytest.approx(1, rel=SAMPLED_STD)
    all_scores = q @ k.T / math.sqrt(D)
    assert scores["std"] < scores["largest"] <= np.abs(all_scores).max() * (1 + SAME_MODEL)
    assert scores["centred_std"] < scores["centred_largest"] < scores["largest"]


def test_a_mask_hides_scores_from_the_statistics(tmp_path):
    drawn = {name: x[:, :64] for name, x in arrays(SMALL_SCORES).items()}
    np.savez(tmp_path / "heads.npz", **drawn)
    scores = result(tmp_path / "heads.npz", "--scale", "2", *FORWARD)["heads"][0]["scores"]
    q, k = (drawn[c][0].astype(np.float64) for c in "qk")
    visible = (2 * q @ k.T)[np.tri(64, dtype=bool)]
    assert scores["std"] == pytest.approx(visible.std(), rel=SAME_MODEL)
    assert scores["largest"] == pytest.approx(np.abs(visible).max(), rel=SAME_MODEL)


def test_safetensors_hold_layers_and_grouped_heads_of_which_some_are_picked(tmp_path):
    drawn = arrays(*[SMALL_SCORES, LARGE_SCORES] * 4, n=600)
    stored = {name: x.reshape(2, 4, 600, D) for name, x in drawn.items()}
    stored |= {name: stored[name][:, ::2].copy() for name in "kv"}
    path = tmp_path / "heads.safetensors"
    lg.save(path, stored)
    found = result(path, *FORWARD, "--layer", "1", "--head", "3", "--head", "0", "--max-tokens", "500")
    assert not found["gradients"]
    assert [(head["layer"], head["head"], head["tokens"]) for head in found["heads"]] == [(1, 0, 500), (1, 3, 500)]
    assert found["heads"][0]["trials"][0]["errors"].keys() == {"out"}
    q, k = (stored[c][1, i, :500].astype(np.float64) for c, i in (("q", 3), ("k", 1)))
    largest = np.abs(q @ k.T / math.sqrt(D))[np.tri(500, dtype=bool)].max()
    # Of half of the queries.
    assert largest / 2 <= found["heads"][1]["scores"]["largest"] <= largest * (1 + SAME_MODEL)


def test_an_engine_that_fails_says_why(tmp_path):
    drawn = arrays(SMALL_SCORES)
    drawn["k"][..., 0] += 1
    drawn["q"][:, 3000] = -100 * np.eye(D)[0]  # its scores are about -25, where a line through small scores is negative
    np.savez(tmp_path / "heads.npz", **drawn)
    done = plan(tmp_path / "heads.npz", *FORWARD)
    assert done.returncode == 0, done.stderr
    assert "degree 1 fails: row 3000 of head 0 has the denominator" in done.stdout
    trials = {trial["engine"]: trial for trial in result(tmp_path / "heads.npz", *FORWARD)["heads"][0]["trials"]}
    assert "denominator" in trials["degree 1"]["failure"]
    assert trials["exact"]["failure"] is None


def test_the_tables_name_engines_errors_and_choices(two_heads):
    done = plan(two_heads, *FORWARD, "--head", "0", "--tol", "0.1", "--tol", "0.02")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "lingrad_rs",
        f"causal attention, forward alone, {N:,} tokens, d = {D}, float32",
        "Layer 0, head 0: scores of standard deviation 0.3",
        "of exact",
        "within",
        "256 landmarks",
        "Left out, with more features than keys: degree 4.",
        "tolerance",
        "predicted",
        "why",
    ):
        assert words in done.stdout
    assert "head 1" not in done.stdout
    assert "dq" not in done.stdout
    assert "0.02" in done.stdout


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot_is_written(suffix, start, two_heads, tmp_path):
    path = tmp_path / f"plot.{suffix}"
    done = plan(two_heads, *FORWARD, "--max-tokens", "2048", "--plot", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(start)


X = np.ones((2, 8, 4), np.float32)
BAD = {
    "a missing file": (None, "missing.npz", [], "No such file"),
    "another kind": ({"q": X, "k": X, "v": X}, "heads.npy", [], "expected a name that ends in .npz or .safetensors"),
    "text as npz": (b"text", "heads.npz", [], "cannot be read as .npz"),
    "text as safetensors": (b"text", "heads.safetensors", [], "cannot be read as safetensors"),
    "no values": ({"q": X, "k": X}, "heads.npz", [], "lacks an array 'v'"),
    "one axis": ({"q": X[0, 0], "k": X, "v": X}, "heads.npz", [], "q has shape (4,); expected (n, d)"),
    "no tokens": ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "heads.npz", [], "at least one token"),
    "keys of another width": ({"q": X, "k": X[..., :3], "v": X}, "heads.npz", [], "k has shape (2, 8, 3)"),
    "fewer keys under a mask": ({"q": X, "k": X[:, :5], "v": X[:, :5]}, "heads.npz", [], "causal=True"),
    "heads that do not divide": ({"q": X[[0, 1, 0]], "k": X, "v": X}, "heads.npz", [], "divides the 3 heads"),
    "integers": ({"q": X.astype(int), "k": X, "v": X}, "heads.npz", [], "q has dtype int64"),
    "pickled objects": ({"q": np.array([None]), "k": X, "v": X}, "heads.npz", [], "cannot be read as .npz"),
    "not a number": ({"q": X * np.nan, "k": X, "v": X}, "heads.npz", [], "NaN"),
    "no such layer": ({"q": X, "k": X, "v": X}, "heads.npz", ["--layer", "1"], "--layer is 1; expected"),
    "no such head": ({"q": X, "k": X, "v": X}, "heads.npz", ["--head", "-1"], "--head is -1; expected"),
    "a tolerance of 1": ({"q": X, "k": X, "v": X}, "heads.npz", ["--tol", "1"], "tol is 1"),
    "no tolerance of float32": ({"q": X, "k": X, "v": X}, "heads.npz", ["--tol", "1e-9"], "at least 1e-5"),
    "no scale": ({"q": X, "k": X, "v": X}, "heads.npz", ["--scale", "nan"], "scale is nan"),
    "no picture": ({"q": X, "k": X, "v": X}, "heads.npz", ["--plot", "plot.pdf"], "ends in .png or .svg"),
}


@pytest.mark.parametrize(("content", "name", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_exits_with_2_and_a_message_and_no_traceback(content, name, options, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with path.open("wb") as file:
            np.savez(file, **content)
    done = plan(path, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())


def test_a_model_is_no_head(tmp_path):
    config = lg.TransformerConfig(n_layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=4)
    lg.save(tmp_path / "model.safetensors", lg.Transformer(config))
    done = plan(tmp_path / "model.safetensors")
    assert done.returncode == 2
    assert "holds a Transformer; expected arrays q, k and v" in " ".join(done.stderr.split())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")
def test_a_dash_is_standard_input_of_either_kind(tmp_path):
    np.savez(tmp_path / "heads.npz", q=X, k=X, v=X)
    lg.save(tmp_path / "heads.safetensors", {"q": X, "k": X, "v": X})
    for path in tmp_path.iterdir():
        done = subprocess.run(
            [COMMAND, "plan", "-", *FORWARD, "--json"],
            input=path.read_bytes(),
            capture_output=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert [head["tokens"] for head in json.loads(done.stdout)["heads"]] == [8, 8]
    done = subprocess.run([COMMAND, "plan", "-"], input=b"text", capture_output=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 2
    assert b"standard input cannot be read as safetensors" in done.stderr


def test_heads_in_bfloat16_are_read_and_what_lies_beside_them_does_not_matter(tmp_path):
    path = tmp_path / "heads.safetensors"
    small = np.random.default_rng(0).integers(-8, 9, (2, 8, 4)).astype(np.float32) / 8  # exact in bfloat16
    lg.save(path, {"q": small, "k": small, "v": small})
    want = result(path, *FORWARD)["heads"][0]["scores"]
    halves = (small.view(np.uint32) >> 16).astype("<u2").tobytes()
    header, data = {}, b""
    for name, dtype, content in [("a", "F8_E5M2", b"12345"), *((x, "BF16", halves) for x in "qkv"), ("z", "F4", b"1")]:
        shape = [2, 8, 4] if dtype == "BF16" else [len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = result(path, *FORWARD)["heads"]
    assert found[0]["scores"] == want
    assert found[0]["dtype"] == "float32"
    path.write_bytes(path.read_bytes().replace(b'"k": {"dtype": "BF16"', b'"k": {"dtype": "F16?"'))
    done = plan(path)
    assert done.returncode == 2
    assert f"k in {path} has dtype F16?, which NumPy does not have" in done.stderr
