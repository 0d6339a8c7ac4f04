"""The harness of hostile inputs: some hundred of them find nothing, and what there is to find is found."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from limits import HANG_SECONDS

HARNESS = Path(__file__).parents[1] / "fuzz" / "python.py"
pytestmark = pytest.mark.skipif(not HARNESS.is_file(), reason="the tests are outside the checkout, without the harness")


def fuzz(harness, *options):
    command = [sys.executable, str(harness), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


@pytest.mark.parametrize(("inputs", "options"), [(400, []), (100, ["--array-path"])], ids=["rust", "array path"])
def test_hostile_inputs_find_nothing(inputs, options):
    done = fuzz(HARNESS, "--inputs", inputs, "--seed", 0, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{inputs} inputs, seed 0, 0 finds$", done.stdout, re.M)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('raise KeyError("x")', "KeyError"),
        ('raise fuzz.lg.LingradError("internal error")', "LingradError"),
        ('fuzz.warnings.warn("x")', "UserWarning"),
        ("fuzz.os.abort()", "the process ended with"),
        ("fuzz.time.sleep(60)", "more than 0.5 s"),
    ],
)
def test_what_is_wrong_is_found_with_its_number(body, told, tmp_path):
    """By the harness, with a target that is wrong for one input in ten."""
    (tmp_path / "wrong.py").write_text(
        textwrap.dedent(f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("fuzz", {str(HARNESS)!r})
        fuzz = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fuzz)
        fuzz.__file__ = __file__
        fuzz.LIMIT = 0.5

        def fuzz_wrong(case):
            if case.draw.index % 10 == 3:
                {body}

        fuzz.TARGETS = ((fuzz_wrong, 1),)
        sys.exit(fuzz.main())
        """)
    )
    done = fuzz(tmp_path / "wrong.py", "--inputs", 10, "--seed", 5)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^FIND \(--seed 5 --only 3\) .*{told}", done.stdout, re.M), done.stdout
    assert "10 inputs, seed 5, 1 finds" in done.stdout
