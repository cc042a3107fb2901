"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import qtrain
from qtrain.train import compose_all, jobs_of

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


def test_every_override_the_readme_shows_is_valid(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # as on a machine of a SLURM cluster
    text = (ROOT / "README.md").read_text()
    script = r"(?:^|`)(?:python train\.py|qtrain (?:train|data|sweep))([^`\n]*)"
    commands = [command.split("#")[0] for command in re.findall(script, text, flags=re.MULTILINE)]
    composed = 0
    for command in commands:
        words = [word.replace("'", "") for word in command.split() if "=" in word]
        words = ["model=nano" if word.startswith("model=hf:") else word for word in words]  # his own
        for config in compose_all(jobs_of(words)[:4]):
            assert config.name
            composed += 1
    assert composed >= 25
