"""Every file of examples/ runs, without a warning, and prints something."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# What an example needs beside the package, which the tests do not require.
NEEDED = {"torch_attention": "torch", "hugging_face": "transformers", "jax_attention": "jax"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_typed(path):
    if path.stem in NEEDED:
        pytest.importorskip(NEEDED[path.stem], reason=f"{NEEDED[path.stem]} is not installed")
    run = subprocess.run([sys.executable, "-W", "error", path], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip()


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
