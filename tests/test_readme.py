"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import qtrain

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_plain_pytorch_loop_learns(capsys, monkeypatch):
    monkeypatch.setattr(qtrain, "convert", partial(qtrain.convert, backend="reference"))  # no compiler needed
    (block,) = [block for block in python_blocks() if "set_step" in block]
    variables: dict = {}
    exec(compile(block, "README.md", "exec"), variables)
    assert variables["losses"][-1] < 0.5 * variables["losses"][0]
    assert "->" in capsys.readouterr().out


def test_every_override_the_readme_shows_is_valid():
    from qtrain.train import compose

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?:^|`)python (?:train|scripts/prepare_data)\.py([^`\n]*)", text, flags=re.MULTILINE)
    composed = 0
    for command in commands:
        words = [word.strip("'") for word in command.split("#")[0].split()]
        if "--help" in words or "-m" in words:
            continue
        words = [word.replace("'", "") for word in words]
        assert compose(words).name
        composed += 1
    assert composed >= 5
