import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_of_the_readme_run_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    exec("\n".join(examples), {})
    assert "ErrorEstimate(relative=0.00" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()
