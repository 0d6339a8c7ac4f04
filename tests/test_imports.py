"""Imports run one way, in both languages: each part knows of those above it in these lists alone."""

import ast
import re
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "lingrad_rs"
CORE = ROOT / "rust" / "core" / "src"
pytestmark = pytest.mark.skipif(not CORE.is_dir(), reason="the sources are read, which are not beside these tests")

# A part is a module, or all of those in a folder; the package itself (its names) is the roof of all.
PYTHON = [
    "_lingrad_rs",
    "errors",
    "backends.select",
    "_check",
    "_files",
    "threads",
    "spec.engines",
    "spec.plan",
    "spec.scores",
    "backends.cpu",
    "backends.array.libraries",
    "backends.array.kernels",
    "backends.array.device",
    "backends.array.texts",
    "backends.array.tiles",
    "backends.array.problem.heads",
    "backends.array.problem.finite",
    "backends.array.softmax",
    "backends.array.linear.monomials",
    "backends.array.linear.features",
    "backends.array.linear.passes",
    "backends.array.linear.scan",
    "backends.array.engines.sample",
    "backends.array.engines.exact",
    "backends.array.engines.polynomial",
    "backends.array.engines.landmark",
    "backends.array.engines",
    "backends.array.measure.guides",
    "backends.array.measure",
    "backends.array.plan.rates",
    "backends.array.plan.cost",
    "backends.array.plan.moments",
    "backends.array.plan",
    "backends.array.tolerance",
    "backends.array.options",
    "backends.array.attention",
    "backends.array.layers",
    "backends.array.layers.attention_block",
    "backends.array.model",
    "backends.array",
    "attention",
    "interchange",
    "torch.tensors",
    "torch.engines",
    "torch.reports",
    "torch.ops",
    "torch.functional",
    "torch.masks",
    "torch.hugging_face",
    "torch",
    "nn.modules",
    "nn.model",
    "cli.devices",
    "cli.timing",
    "cli.surveys",
    "cli.app",
    "cli.bench",
    "cli.grad",
    "cli.plan",
    "cli",
    "jax.host",
    "jax.sharding",
    "jax.attention",
    "jax",
]
RUST = [
    "error",
    "context",
    "memory",
    "numerics",
    "problem",
    "spec",
    "linear",
    "engines",
    "measure",
    "plan",
    "tolerance",
    "attention",
    "halves",
    "naive",
    "layers",
    "model",
]


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path, modules):
    """The modules of the package that a file imports; functions' own imports count too."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                name = ".".join([*base, alias.name])
                yield name if name in modules else ".".join(base)


def python_imports():
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    modules = {*files, "_lingrad_rs"}
    return {module: set(imported_by(path, modules)) for module, path in files.items() if module}


def rust_files():
    """Of each file of the core, as a module's path, the paths that it names; tests may name any."""
    files = {}
    for path in CORE.rglob("*.rs"):
        parts = path.relative_to(CORE).with_suffix("").parts
        if parts == ("lib",) or "tests" in parts:
            continue
        here = parts[:-1] if parts[-1] == "mod" else parts
        text = re.sub(r"//.*", "", path.read_text().partition("#[cfg(test)]\nmod tests {")[0])
        named = {name for use in re.findall(r"\b(?:crate|super|self)::[^;()<>&]*", text) for name in expanded(use)}
        files[here] = {absolute(here, name) for name in named}
    return files


def expanded(use):
    """The paths of ``a::{b, c::d}``, each as a tuple."""
    match = re.match(r"([\w:]*)", re.sub(r"\s+", " ", use))
    head, rest = match[1].strip(":"), re.sub(r"\s+", " ", use)[match.end() :]
    if not (rest.startswith("{") and match[1].endswith("::")):
        return {tuple(head.split("::"))}
    depth, parts, part = 0, [], ""
    for letter in rest:
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            break
        if letter == "," and depth == 1:
            parts, part = [*parts, part], ""
        elif not (letter == "{" and depth == 1):
            part += letter
    inner = (name for part in [*parts, part] for name in expanded(part.strip()))
    return {(*head.split("::"), *name) for name in inner}


def absolute(here, name):
    """A path from the root of the core."""
    if name[0] == "crate":
        return name[1:]
    while name and name[0] in ("super", "self"):
        here, name = (here[:-1] if name[0] == "super" else here), name[1:]
    return (*here, *name)


def rust_imports():
    """Of each part of the core, the parts that its files name."""
    imports = {}
    for here, named in rust_files().items():
        imports.setdefault(here[0], set()).update(name[0] for name in named if name)
    return imports


@pytest.mark.parametrize(("imports", "order"), [(python_imports, PYTHON), (rust_imports, RUST)], ids=["Python", "Rust"])
def test_imports_run_one_way(imports, order):
    place = {name: i for i, name in enumerate(order)}
    # Macros, and the names of a folder that holds nothing itself, are nowhere in the order.
    found = {part: {name for name in named if name in place} - {part} for part, named in imports().items()}
    upward = [(part, name) for part in found for name in found[part] if place.get(part, -1) <= place[name]]
    assert upward == []


def test_every_part_has_its_place():
    """So that a new file is put somewhere on purpose."""
    # These say what their folder holds, and nothing more.
    titles = {"backends", "spec", "nn", "backends.array.linear", "backends.array.problem"}
    assert sorted(python_imports().keys() - titles) == sorted({*PYTHON} - {"_lingrad_rs"})
    assert sorted(rust_imports()) == sorted(RUST)
    assert all(not imported for part, imported in python_imports().items() if part in titles)
    assert {part for part, named in python_imports().items() if "" in named} <= {"cli.app", "cli.timing"}


def test_no_files_of_the_core_name_each_other_in_a_circle():
    """Files of one folder neither. A folder's own file may name those inside, and they what it declares."""
    files = rust_files()
    edges = {}
    for here, named in files.items():
        held = {next((name[:i] for i in range(len(name), 0, -1) if name[:i] in files), here) for name in named}
        edges[here] = {there for there in held if there != here[: len(there)]}
    assert sum(map(len, edges.values())) > 100, "nothing was read"
    while leaves := [here for here, named in edges.items() if not named & edges.keys()]:
        for here in leaves:
            del edges[here]
    assert edges == {}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_mutations_change_stands_in_the_core_once(mutation):
    assert (CORE / mutation.file).read_text().count(mutation.old) == 1
