"""The command ``lingrad`` as a user types it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import relative_error, small_config
from limits import (
    CLI_COMPARE,
    CLI_COMPARE_DEGREE_4,
    FLOAT32_LOSS,
    FLOAT32_MODEL,
    HANG_SECONDS,
    NOT_EXACT,
    PEAK_MEMORY,
    SECONDS_UNTIL_THE_COMMAND_COMPUTES,
    UNTRAINED_LOSS,
)

import lingrad_rs as lg

# More tokens than the 1024 at the start that fitted coefficients leave exact.
TOKENS = 2048
SMALL = ("--tokens", str(TOKENS), "--layers", "2", "--d-model", "32", "--heads", "2")
ENGINE = lg.Polynomial(coefficients="fitted")  # unless asked for another
CONFIG = lg.TransformerConfig(n_layers=2, d_model=32, n_heads=2, d_ff=128, vocab_size=256, engine=ENGINE)
KEYS = {"loss", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "layers", "compare"}
HEAD_KEYS = {"engine", "errors", "error_bound", "reason", "missed", "whole_sequence"}
COMMAND = [Path(sys.executable).with_name("lingrad" + (".exe" if sys.platform == "win32" else ""))]


def lingrad(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=os.environ | {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"} | environment,
        check=False,
    )


def grad(*arguments):
    """The JSON object of ``lingrad grad ... --json``."""
    done = lingrad("grad", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def library_sources(size):
    """The default text, by the words of the documentation: Python's own library, file after file."""
    root = Path(os.__file__).parent
    files = (path for path in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & {*path.parts})
    text = bytearray()
    while len(text) < size:
        text += next(files).read_bytes()
    return np.frombuffer(bytes(text[:size]), np.uint8)


def test_json_holds_every_key_and_its_comparison_is_close(tmp_path):
    out = tmp_path / "grads.safetensors"
    result = grad(*SMALL, "--compare", "exact", "--out", out)
    assert result.keys() == KEYS
    assert result["tokens"] == TOKENS
    assert UNTRAINED_LOSS[0] <= result["loss"] <= UNTRAINED_LOSS[1]
    assert result["tokens_per_second"] == TOKENS / result["seconds"]
    assert result["peak_memory_bytes"] >= PEAK_MEMORY
    assert len(result["layers"]) == 2
    for layer in result["layers"]:
        assert layer.keys() == {"engine", "measured_error", "grad_norm", "heads"}
        assert layer["engine"] == "polynomial"
        assert [head["engine"] for head in layer["heads"]] == ["polynomial, degree 2"] * 2
        for head in layer["heads"]:
            assert head.keys() == HEAD_KEYS
            assert head["errors"].keys() == {"out", "dq", "dk", "dv"}
            assert min(head["errors"].values()) >= NOT_EXACT
            assert max(head["errors"].values()) <= CLI_COMPARE
        assert NOT_EXACT <= layer["measured_error"] <= CLI_COMPARE
        assert layer["grad_norm"] > 0
    compare = result["compare"]
    assert compare.keys() == {"relative_error", "speedup"}
    assert compare["relative_error"].keys() == CONFIG.param_shapes().keys()
    assert max(compare["relative_error"].values()) <= CLI_COMPARE
    assert min(compare["relative_error"].values()) >= NOT_EXACT
    assert compare["speedup"] > 0
    grads = lg.load(out)
    assert {name: x.shape for name, x in grads.items()} == CONFIG.param_shapes()
    assert all(np.isfinite(x).all() and x.any() for x in grads.values())


def test_gradients_are_those_of_the_library(tmp_path):
    out = tmp_path / "grads.safetensors"
    result = grad(*SMALL, "--seed", "3", "--out", out)
    text = library_sources(TOKENS + 1)
    loss, want = lg.Transformer(CONFIG, seed=3).value_and_grad(text[:-1], text[1:])
    assert relative_error(result["loss"], loss) <= FLOAT32_LOSS
    assert result["compare"] is None
    grads = lg.load(out)
    assert max(relative_error(grads[name], want[name]) for name in want) <= FLOAT32_MODEL


def worst_error(*options):
    return max(grad(*SMALL, *options, "--compare", "exact")["compare"]["relative_error"].values())


def test_a_higher_degree_and_fitted_coefficients_are_closer():
    taylor, fitted = worst_error("--coefficients", "taylor"), worst_error()
    degree_4 = worst_error("--degree", "4")
    assert degree_4 < fitted < taylor <= CLI_COMPARE
    assert degree_4 <= CLI_COMPARE_DEGREE_4


def test_exact_engine_has_no_error():
    result = grad(*SMALL, "--engine", "exact", "--compare", "exact")
    assert set(result["compare"]["relative_error"].values()) == {0}
    assert {layer["engine"] for layer in result["layers"]} == {"exact"}
    assert max(layer["measured_error"] for layer in result["layers"]) <= FLOAT32_MODEL


# So many tokens that some engines pay.
PLANNED = ("--tokens", "4096", "--layers", "2", "--d-model", "32", "--heads", "2")


def test_within_a_tolerance_every_head_is_within_it_or_exact():
    tol = 1e-1
    heads = [head for layer in grad(*PLANNED, "--tol", str(tol))["layers"] for head in layer["heads"]]
    assert len(heads) == 4
    approximate = [head for head in heads if head["engine"] != "exact"]
    assert approximate
    for head in heads:
        assert head.keys() == HEAD_KEYS
        assert head["reason"]
        assert head["errors"].keys() == {"out", "dq", "dk", "dv"}
        measured = {name: error for name, error in head["errors"].items() if error is not None}
        if head in approximate:
            assert min(measured.values()) >= NOT_EXACT
            assert max(measured.values()) <= tol
            assert measured.keys() == ({"out"} if head["missed"] else head["errors"].keys())
            assert not head["missed"] or "computed exactly instead" in head["missed"]
        else:
            assert not measured


def test_auto_is_a_tolerance_of_a_hundredth():
    given, default = grad(*PLANNED, "--tol", "1e-2"), grad(*PLANNED, "--engine", "auto")
    assert given["layers"] == default["layers"]
    assert given["loss"] == default["loss"]
    assert {layer["engine"] for layer in given["layers"]} == {"auto"}


def constants_of_later_tokens(*options):
    layers = grad(*PLANNED, "--tol", "3e-1", *options)["layers"]
    return {name for layer in layers for head in layer["heads"] for name in head["whole_sequence"]}


def test_strictly_causal_engines_have_no_constants_of_later_tokens():
    assert "coefficients" in constants_of_later_tokens()
    assert constants_of_later_tokens("--strict-causal") == set()


def test_landmarks_are_as_many_as_were_asked_for():
    layers = grad(*SMALL, "--engine", "landmark", "--rank", "24")["layers"]
    assert {layer["engine"] for layer in layers} == {"landmark"}
    assert {head["engine"] for layer in layers for head in layer["heads"]} == {"24 landmarks"}


@pytest.mark.parametrize("engine", [lg.Landmark(24, seed=3), lg.Auto(0.25, strict_causal=True, seed=2)])
def test_a_stored_model_keeps_its_engine(engine, tmp_path):
    config = small_config(vocab_size=256, engine=engine)
    lg.save(tmp_path / "model", lg.Transformer(config))
    loaded = lg.load(tmp_path / "model")
    assert loaded.config == config
    layers = grad("--params", tmp_path / "model", "--tokens", "300")["layers"]
    assert {layer["engine"] for layer in layers} == {type(engine).__name__.lower()}


def test_a_model_with_constants_of_landmarks_is_not_saved(tmp_path):
    constants = lg.LandmarkConstants(1.0, np.zeros(4), np.zeros(4), 1.0, np.zeros((2, 4)), np.eye(2))
    model = lg.Transformer(small_config(engine=lg.Landmark(2, constants=constants)))
    with pytest.raises(lg.ArgumentError, match="expected one without constants"):
        lg.save(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


def test_a_tolerance_shows_the_engine_of_each_head_and_why():
    done = lingrad("grad", *PLANNED, "--tol", "1e-1")
    assert done.returncode == 0, done.stderr
    for words in ("errors of each head", "why", "dq", "dk", "dv", "the cheapest within 1.0e-1"):
        assert words in done.stdout


def test_a_text_of_one_s_own_is_read_as_bytes(tmp_path):
    text = "Grüße, 注意力! ".encode() * 20
    (tmp_path / "text").write_bytes(text)
    result = grad(*SMALL, "--tokens", "200", "--text", tmp_path / "text")
    tokens = np.frombuffer(text, np.uint8)
    loss, _ = lg.Transformer(CONFIG).value_and_grad(tokens[:200], tokens[1:201])
    assert relative_error(result["loss"], loss) <= FLOAT32_LOSS


@pytest.mark.parametrize("what", ["a model", "bare parameters"])
def test_parameters_of_one_s_own_are_read_with_their_sizes(what, tmp_path, dtype):
    config = small_config(vocab_size=256, n_kv_heads=None, engine=dataclasses.replace(ENGINE, degree=4))
    model = lg.Transformer(config, seed=5, dtype=dtype)
    lg.save(tmp_path / "params", model if what == "a model" else model.params)
    options = () if what == "a model" else ("--heads", "4", "--degree", "4")
    result = grad("--params", tmp_path / "params", "--tokens", "300", *options, "--out", tmp_path / "grads")
    text = library_sources(301)
    loss, want = model.value_and_grad(text[:-1], text[1:])
    assert relative_error(result["loss"], loss) <= FLOAT32_LOSS
    grads = lg.load(tmp_path / "grads")
    assert grads["head"].dtype == dtype
    assert max(relative_error(grads[name], want[name]) for name in want) <= FLOAT32_MODEL


def test_without_json_a_person_can_read_it():
    done = lingrad("grad", *SMALL, "--compare", "exact", "--threads", "1")
    assert done.returncode == 0
    assert done.stderr == ""
    for words in (
        "loss ",
        "tokens/s",
        f"{TOKENS} tokens",
        "peak memory",
        "gradient norm",
        "polynomial, degree 2",
        "speed-up",
    ):
        assert words in done.stdout
    assert all(name in done.stdout for name in CONFIG.param_shapes())
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert sum("polynomial, degree 2" in line for line in lines) == 2 + 4  # one a layer, and one a head


def test_help_tells_every_option():
    general, of_grad = lingrad("--help"), lingrad("grad", "--help")
    assert general.returncode == of_grad.returncode == 0
    assert "grad" in general.stdout
    options = [
        "text",
        "params",
        "tokens",
        "layers",
        "d-model",
        "heads",
        "engine",
        "degree",
        "coefficients",
        "rank",
        "tol",
        "strict-causal",
        "compare",
        "threads",
        "json",
        "out",
    ]
    assert all(f"--{option}" in of_grad.stdout for option in options)


def test_version_is_the_library_s():
    done = lingrad("--version")
    assert done.returncode == 0
    assert done.stdout.split() == ["lingrad_rs", lg.__version__]


def test_threads_do_not_change_the_loss():
    losses = {grad(*SMALL, "--threads", n)["loss"] for n in (1, 2, 5)}
    assert len(losses) == 1


BAD = {
    "short text": (["--text", "{short}"], "has 5 bytes; expected at least 2049"),
    "missing text": (["--text", "{missing}"], "No such file"),
    "a folder as text": (["--text", "{folder}"], "directory"),
    "missing parameters": (["--params", "{missing}"], "No such file"),
    "parameters that are text": (["--params", "{short}"], "cannot be read as safetensors"),
    "heads that do not divide": (["--heads", "5"], "n_heads is 5; expected a divisor of d_model = 32"),
    "odd width of a head": (["--heads", "32"], "even"),
    "no layers": (["--layers", "0"], "n_layers is 0; expected"),
    "no tokens": (["--tokens", "0"], "--tokens"),
    "degree 0": (["--degree", "0"], "degree is 0; expected"),
    "degree of the exact engine": (["--engine", "exact", "--degree", "2"], "--degree needs --engine polynomial"),
    "coefficients of the exact engine": (
        ["--engine", "exact", "--coefficients", "taylor"],
        "--coefficients needs --engine polynomial",
    ),
    "a tolerance of the exact engine": (["--engine", "exact", "--tol", "0.1"], "--tol needs --engine auto; got exact"),
    "degree under a tolerance": (["--tol", "0.1", "--degree", "2"], "--degree needs --engine polynomial; got auto"),
    "coefficients under a tolerance": (
        ["--engine", "auto", "--coefficients", "fitted"],
        "--coefficients needs --engine polynomial; got auto",
    ),
    "rank under a tolerance": (["--tol", "0.1", "--rank", "9"], "--rank needs --engine landmark; got auto"),
    "rank of a polynomial": (["--rank", "9"], "--rank needs --engine landmark; got polynomial"),
    "a strictly causal polynomial": (["--strict-causal"], "--strict-causal needs --engine auto; got polynomial"),
    "a tolerance of 2": (["--tol", "2"], "tol is 2"),
    "a tolerance below rounding": (["--tol", "1e-9"], "tol is 1e-9; expected at least 1e-5"),
    "no landmarks": (["--engine", "landmark", "--rank", "0"], "rank is 0; expected"),
    "unknown coefficients": (["--coefficients", "magic"], "--coefficients"),
    "unknown engine": (["--engine", "magic"], "--engine"),
    "unknown comparison": (["--compare", "magic"], "--compare"),
    "no folder to write to": (["--out", "{missing}/grads"], "there is no directory"),
    "a folder to write to": (["--out", "{folder}"], "cannot be written: Is a directory"),
    "tokens without end": (["--tokens", "1e11", "--text", "{short}"], "has 5 bytes; expected at least 100000000001"),
    "tokens without end of the library": (["--tokens", "100000000000"], "bytes; expected at least 100000000001"),
    "half a token": (["--tokens", "1.5"], "'1.5' is not an integer"),
    "tokens that are none": (["--tokens", "nan"], "'nan' is not an integer"),
    "a number without end": (["--tokens", "1e999999999"], "'1e999999999' is not an integer"),
    "layers without end": (["--layers", "1000000000"], "in float32 they would take 49408000065664 bytes"),
    "a width without end": (["--d-model", "1e6"], "--d-model 1000000 --d-ff 4000000 --tokens 2048 would take 192,"),
    "hidden units without end": (["--d-ff", "99999999999"], "would take 102,400,00"),
    "sizes beyond 64 bits": (["--d-ff", "1e19"], "d_ff is 10000000000000000000; expected an integer below 2**63"),
    "standard input twice": (["--text", "-", "--params", "-"], "expected standard input to be one of them"),
    "no threads": (["--threads", "0"], "--threads"),
    "unknown option": (["--tokns", "5"], "--tokns"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_exits_with_2_and_a_message_and_no_traceback(arguments, message, tmp_path):
    (tmp_path / "short").write_bytes(b"short")
    paths = {"short": tmp_path / "short", "missing": tmp_path / "missing", "folder": tmp_path}
    done = lingrad("grad", *SMALL, *(argument.format(**paths) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # The message may be wrapped and framed.
    assert message in " ".join(done.stderr.replace("│", " ").split())


def wait_until_it_computes(process):
    """Until the crate's threads are there, where the system tells of them; however slow the machine is."""
    tasks = Path(f"/proc/{process.pid}/task")
    until = time.monotonic() + HANG_SECONDS
    while tasks.is_dir() and process.poll() is None and time.monotonic() < until:
        if any("lingrad-" in name.read_text() for name in tasks.glob("*/comm")):
            break
        time.sleep(0.05)
    time.sleep(SECONDS_UNTIL_THE_COMMAND_COMPUTES)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_exits_with_130_and_no_traceback():
    command = [*COMMAND, "grad", "--tokens", "200000", "--engine", "exact"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_it_computes(process)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=HANG_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr


ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other shells and streams")


def shell(script, *arguments, **options):
    """Runs ``lingrad ...``, which is "$@" in the script."""
    command = ["bash", "-c", script, "bash", *COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=HANG_SECONDS, check=False, **options)


UNWRITABLE = {
    "a folder": ("{folder}/folder.png", "cannot be written: Is a directory"),
    "in no folder": ("{folder}/missing/plot.png", "there is no directory"),
    "in a file": ("{folder}/file/plot.png", "there is no directory"),
    "where nothing can be made": ("/proc/plot.png", "cannot be written: "),
    "a name that is too long": ("{folder}/" + 300 * "x" + ".png", "cannot be written: File name too long"),
}


@pytest.mark.skipif(not os.path.exists("/proc"), reason="there is no folder where nobody may make a file")
@pytest.mark.parametrize("command", [("grad", "--out"), ("bench", "--plot"), ("plan", "missing.npz", "--plot")])
@pytest.mark.parametrize(("path", "message"), UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(path, message, command, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    # Of a text, and of heads, that are missing, which would be told next.
    done = lingrad(*command, path.format(folder=tmp_path), *(("--text", "missing") if command[0] == "grad" else ()))
    assert done.returncode == 2
    assert done.stderr.startswith(f"lingrad: {command[-1]} ")
    assert message in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
    assert os.listdir(tmp_path / "folder.png") == []


@ON_POSIX
@pytest.mark.parametrize("arguments", [("grad", *SMALL), ("grad", *SMALL, "--json"), ("--help",), ("--version",)])
def test_a_pipe_that_nobody_reads_ends_the_command_quietly_as_it_does_others(arguments):
    done = shell('"$@" | true; exit ${PIPESTATUS[0]}', *arguments)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stdout == done.stderr == b""


@ON_POSIX
@pytest.mark.parametrize("arguments", [("grad", *SMALL), ("grad", *SMALL, "--json"), ("--help",), ("--version",)])
def test_a_closed_output_is_no_error(arguments, tmp_path):
    out = ("--out", tmp_path / "grads") if arguments[0] == "grad" else ()
    done = shell('exec "$@" >&-', *arguments, *out)
    assert done.returncode == 0
    assert done.stdout == done.stderr == b""
    if out:
        assert lg.load(tmp_path / "grads").keys() == CONFIG.param_shapes().keys()


@ON_POSIX
def test_with_its_errors_closed_the_command_does_what_it_does_otherwise():
    done = shell('exec "$@" 2>&-', "grad", *SMALL, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout).keys() == KEYS
    done = shell('exec "$@" 2>&-', "grad", "--layers", "0")
    assert done.returncode == 2
    assert done.stdout == done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", [("grad", *SMALL), ("grad", *SMALL, "--json"), ("--help",), ("--version",)])
def test_an_output_that_is_full_is_told_without_a_traceback(arguments):
    done = shell('exec "$@" >/dev/full', *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(b"lingrad: ")
    assert done.stderr.endswith(b" No space left on device\n")
    assert b"Traceback" not in done.stderr


@ON_POSIX
def test_a_dash_is_standard_input(tmp_path):
    text = bytes(range(200))
    (tmp_path / "text").write_bytes(text)
    config = small_config(vocab_size=256)
    lg.save(tmp_path / "model", lg.Transformer(config, seed=5))
    (model,) = tmp_path.glob("model")
    want = grad(*SMALL, "--tokens", "150", "--text", tmp_path / "text")["loss"]
    options = ("grad", *SMALL, "--tokens", "150", "--json")
    assert json.loads(shell('exec "$@"', *options, "--text", "-", input=text).stdout)["loss"] == want
    # A pipe by its name, too.
    script = f'exec "$@" --text <(cat {tmp_path / "text"})'
    assert json.loads(shell(script, *options).stdout)["loss"] == want
    want = grad("--params", model, "--tokens", "150", "--text", tmp_path / "text")["loss"]
    options = ("grad", "--tokens", "150", "--json", "--text", tmp_path / "text", "--params")
    assert json.loads(shell('exec "$@"', *options, "-", input=model.read_bytes()).stdout)["loss"] == want
    done = shell('exec "$@"', "grad", *SMALL, "--text", "-", input=b"abc")
    assert done.returncode == 2
    assert b"the text (standard input) has 3 bytes; expected at least 2049" in done.stderr
    done = shell('exec "$@" <&-', "grad", *SMALL, "--text", "-")
    assert done.returncode == 2
    assert b"- is standard input, which is closed" in done.stderr


@ON_POSIX
def test_a_text_without_end_is_read_no_further_than_its_tokens():
    result = grad(*SMALL, "--text", "/dev/zero")
    assert result["tokens"] == TOKENS
    done = lingrad("grad", *SMALL, "--text", "/dev/zero", "--tokens", "1e12")
    assert done.returncode == 2
    assert "for the layers' inputs; there are" in done.stderr


def test_integers_may_have_exponents():
    assert grad(*SMALL, "--tokens", "1e2", "--d-model", "3.2e1")["tokens"] == 100


@pytest.mark.parametrize(
    ("name", "message"),
    [("bias", "holds 'bias', which the model does not have"), ("layers.9" + 30 * "9" + ".w", "lacks 'layers.2.attn_n")],
)
def test_parameters_of_another_model_are_told_by_name_before_they_are_read(name, message, tmp_path):
    arrays = {x: np.zeros(shape) for x, shape in CONFIG.param_shapes().items()}
    lg.save(tmp_path / "params", arrays | {name: np.zeros(3)})
    content = (tmp_path / "params").read_bytes()
    (tmp_path / "params").write_bytes(content.replace(b'"F64"', b'"F8?"'))  # which cannot be read
    done = lingrad("grad", "--params", tmp_path / "params", "--heads", "2")
    assert done.returncode == 2
    assert message in done.stderr
