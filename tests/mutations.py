"""Breaks the core in ten places, one by one, and tells whether the tests notice each: ``nox -s mutations``.

Each change is made in a copy of the checkout, compiled, and met by ``pytest -x``. Exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = "rust/core/src"


@dataclass(frozen=True)
class Mutation:
    """A text that stands in a file once, and what takes its place."""

    what: str
    file: str
    old: str
    new: str

    def apply(self, root: Path) -> str:
        """Writes the changed file, and returns what it was."""
        path = root / CORE / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.what}: {self.file} has {text.count(self.old)} times {self.old!r}; expected once")
        path.write_text(text.replace(self.old, self.new))
        return text


MUTATIONS = [
    Mutation("a sign: dS = f (e + delta)", "engines/exact/mod.rs", "f.times(*ds - delta)", "f.times(*ds + delta)"),
    Mutation(
        "a factor: dk without the scale",
        "engines/exact/mod.rs",
        "add_product(view_mut(dk, bk, d), ds.transpose(), q, c);",
        "add_product(view_mut(dk, bk, d), ds.transpose(), q, T::ONE);",
    ),
    Mutation(
        "an off-by-one at a tile's edge: the gradient of one later key",
        "engines/exact/mod.rs",
        "x[end.max(start)..].fill(T::ZERO);",
        "x[(end.max(start) + 1).min(bk)..].fill(T::ZERO);",
    ),
    Mutation(
        "a missing bias: exact gradients forget it",
        "engines/exact/mod.rs",
        "if b == T::NEG_INFINITY { b } else { *s + b }",
        "if b == T::NEG_INFINITY { b } else { *s }",
    ),
    Mutation(
        "a lost reverse scan: later queries give far keys nothing",
        "linear/scan.rs",
        "    add_far_key_gradients(pass, &cut, &up, dk, dv, dkey_bias)\n",
        "    let _ = (dk, dv, dkey_bias, add_far_key_gradients::<T>);\n    Ok(())\n",
    ),
    Mutation(
        "a wrong merge: states of other levels are added as they are",
        "linear/state.rs",
        "*sum = *sum * decay + part.to_f64();",
        "*sum = *sum + part.to_f64() + 0.0 * decay;",
    ),
    Mutation(
        "a wrong power: the potential's coefficients",
        "linear/polynomials.rs",
        "a / (j + 1) as f64",
        "a / (j + 2) as f64",
    ),
    Mutation(
        "one key too few: the window before a block",
        "linear/nearby.rs",
        "(c * BLOCK).saturating_sub(self.window)",
        "(c * BLOCK).saturating_sub(self.window.saturating_sub(1))",
    ),
    Mutation(
        "a sign: the part of a norm's gradient along x",
        "layers/norm.rs",
        "r * (dx[i] - shift - x[i] * along)",
        "r * (dx[i] - shift + x[i] * along)",
    ),
    Mutation(
        "a tolerance that is not held: whatever the error is",
        "tolerance/mod.rs",
        "if error.high <= auto.tol && all_finite(out) {",
        "if error.low <= 1e3 * auto.tol && all_finite(out) {",
    ),
]


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def build(root: Path) -> None:
    """Installs the changed core, in place of the one that is installed."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "."]
    built = run([*command, "--config-settings", "build-args=--profile quick"], root)
    if built.returncode:
        raise SystemExit(f"a mutation does not compile:\n{built.stdout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations, from 1 on; all unless given")
    parser.add_argument("tests", nargs="*", help="arguments of pytest; all tests unless given")
    arguments = parser.parse_args()
    numbers = arguments.only or range(1, len(MUTATIONS) + 1)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".git", ".nox", ".venv", "target", "dist", "*.so", "__pycache__")
        shutil.copytree(ROOT, root, ignore=skipped)
        os.environ.setdefault("CARGO_TARGET_DIR", str(Path(folder) / "target"))
        for number in numbers:
            mutation = MUTATIONS[number - 1]
            before = mutation.apply(root)
            build(root)
            start = time.perf_counter()
            tested = run([sys.executable, "-m", "pytest", "-x", "-q", "-n", "auto", *arguments.tests], root)
            seconds = time.perf_counter() - start
            failed = re.search(r"^FAILED (\S+)", tested.stdout, re.M)
            noticed = tested.returncode in (1, 2) and failed is not None  # 2: workers were stopped by -x
            unnoticed += not noticed
            by = f"noticed after {seconds:.0f} s by {failed[1]}" if noticed and failed else "NOT NOTICED"
            print(f"{number:2}. {mutation.what}: {by}", flush=True)
            if not noticed:
                print(tested.stdout[-2000:])
            (root / CORE / mutation.file).write_text(before)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
