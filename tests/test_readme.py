import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = re.compile(r"(?:<!-- needs (.*?) -->\n)?```python\n(.*?)```", re.DOTALL)


def run_examples(count, needs=""):
    """The examples of the README that need that beside the library, one after the other."""
    found = EXAMPLE.findall(README.read_text(encoding="utf-8"))
    assert {need for need, _ in found} == {"", "PyTorch", "transformers", "JAX", "a GPU"}
    examples = [code for need, code in found if need == needs]
    assert len(examples) == count
    exec("\n".join(examples), {})


def test_the_examples_of_the_readme_run_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(5)
    assert "ErrorEstimate(relative=0.00" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("library", ["PyTorch", "transformers", "JAX"])
def test_the_example_of_a_library_runs_as_typed(library):
    module = {"PyTorch": "torch", "JAX": "jax"}.get(library, library)
    pytest.importorskip(module, reason=f"{library} is not installed, which the tests do not require")
    run_examples(1, needs=library)


@pytest.mark.gpu
def test_the_example_of_a_gpu_runs_as_typed(capsys):
    run_examples(1, needs="a GPU")
    assert "ErrorEstimate(relative=0.00" in capsys.readouterr().out
