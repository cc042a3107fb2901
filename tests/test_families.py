"""A family is added by one module: an optimiser, a schedule, a relative of Llama and a source of text are put beside
those there are, in a copy of the package, and a run trains with all four at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.config import Config, config_hash
from qtrain.config.settings import fields_at, parse
from qtrain.data.base import DataSettings
from qtrain.errors import UserError
from qtrain.plan import make_plan
from qtrain.train import compose

ROOT = Path(__file__).parents[1]

ADDED = {
    "qtrain/optim/optimizers/sgd.py": """
import math
from typing import Literal
from pydantic import Field
from qtrain.optim.base import OptimizerSettings

class SGD(OptimizerSettings):
    name: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1)

    def state_bytes(self, shape):
        return 4 * math.prod(shape)

    def build(self, decay, no_decay):
        from torch.optim import SGD

        groups = [
            {"params": list(decay.values()), "weight_decay": self.weight_decay},
            {"params": list(no_decay.values()), "weight_decay": 0.0},
        ]
        return SGD(groups, lr=self.lr, momentum=self.momentum)
""",
    "qtrain/optim/schedules/linear.py": """
from typing import Literal
from pydantic import Field
from qtrain.optim.base import Schedule

class Linear(Schedule):
    name: Literal["linear"]
    final_factor: float = Field(0.0, ge=0, le=1)

    def after_warmup(self, step, peak, total_steps):
        return 1.0 + (self.final_factor - 1.0) * (step - peak) / (total_steps - 1 - peak)
""",
    "qtrain/models/families/neox.py": '''
from typing import ClassVar, Literal
from qtrain.models.base import Transformer

class NeoX(Transformer):
    """Attention and MLP side by side, LayerNorm, GELU. Source: GPT-NeoX-20B, arXiv 2204.06745."""

    to_residual: ClassVar[tuple[str, ...]] = ("attention.o", "mlp.down")
    family: Literal["neox"]
    bias: bool = True

    def block(self):
        from qtrain.models.layers import Attention, Composed
        from qtrain_kernels.precision import Linear

        up, down = Linear(self.dim, self.ffn_dim, bias=self.bias), Linear(self.ffn_dim, self.dim, bias=self.bias)
        mlp = Composed(feed_forward, up=up, down=down)
        return Composed(
            parallel, attention_norm=self.norm(), mlp_norm=self.norm(), attention=Attention(self), mlp=mlp
        )

    def norm(self):
        from torch import nn

        return nn.LayerNorm(self.dim, eps=self.norm_eps)

    def tables(self):
        from qtrain.models.layers import rope_tables

        cos, sin = rope_tables(self.seq_len, self.head_width, self.rope_theta)
        return {"cos": cos, "sin": sin}

def parallel(block, x, cos, sin, cu_seqlens):
    return x + block.attention(block.attention_norm(x), cos, sin, cu_seqlens) + block.mlp(block.mlp_norm(x))

def feed_forward(mlp, x):
    from torch.nn.functional import gelu

    return mlp.down(gelu(mlp.up(x)))
''',
    "qtrain/data/sources/csv.py": """
import csv
from typing import Literal
from qtrain.data.base import Document
from qtrain.data.files import RowFiles

class Csv(RowFiles):
    source: Literal["csv"]
    delimiter: str = ","

    def options(self):
        return [self.text_field, self.delimiter]

    def read(self, path):
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=self.delimiter), start=2):
                yield Document(f"{path}:{number}", row[self.text_field])
""",
}
ALL = ["optimizer.name=sgd", "scheduler.name=linear", "model.family=neox", "data.source=csv"]
OWN = ["optimizer.momentum=0.5", "scheduler.final_factor=0.25", "model.bias=false", "data.delimiter=';'"]
SMALL = [
    "model.dim=32", "model.ffn_dim=64", "model.n_layers=1", "model.seq_len=16", "trainer.batch_tokens=64",
    "trainer.micro_batch_size=4", "trainer.tokens=320", "trainer.precision=32-true", "trainer.device=cpu",
    "data.val_tokens=64", "recipe=quartet", "recipe.skip=[lm_head]",
]  # fmt: skip
TRAINED = """
import json, sys
from pathlib import Path
from qtrain.config import config_hash, parse_saved
from qtrain.data.prepare import prepare
from qtrain.config import config_hash
from qtrain.errors import UserError
from qtrain.models.decoder import count_parameters
from qtrain.quant.linear import QuantLinear
from qtrain.train import compose
from qtrain.training.build import load_run
from qtrain.training.session import run

every, own, wrong, saved = json.loads(sys.argv[1])
config = compose([*every, *own])
assert run(config) is not None
model = load_run(next(Path(config.run_root).glob("quartet-*")))
layers = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
assert layers == [*(f"layers.0.attention.{x}" for x in "qkvo"), "layers.0.mlp.up", "layers.0.mlp.down"], layers
total = sum(parameter.numel() for parameter in model.parameters())
assert count_parameters(config.model, 257) == (total, total - 2 * 257 * 32)
for override in wrong:
    try:
        compose([*every, override])
        raise SystemExit(f"{override} was taken")
    except UserError as error:
        print(error)
values = [*own[:3], "data.delimiter=','", "seed=0"]
hashes = {config_hash(compose([*every, value])) for value in values}
assert len(hashes) == 5, "each setting is in the hash"
assert config_hash(parse_saved(saved["tree"])) == saved["hash"], "what is added renames no run"
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("qtrain", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in ADDED.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


def test_one_module_adds_each(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text;more\n" + "".join(f"document {i} of them;x\n" for i in range(60)))
    config = compose(["trainer.precision=bf16-mixed"])
    saved = {"tree": config.model_dump(mode="json"), "hash": config_hash(config)}
    del saved["tree"]["model"]["family"]  # as versions with one family wrote it
    wrong = ["model.family=neo", "model.n_experts=3", "data.source=tsv", "data.packages=[torch]", "optimizer.beta1=0.5"]
    places = [f"data.files={tmp_path}/x.csv", f"data.cache_dir={tmp_path}/cache", f"run_root={tmp_path}/runs"]
    done = subprocess.run(
        [sys.executable, "-c", TRAINED, json.dumps([[*ALL, *SMALL, *places, OWN[-1]], OWN, wrong, saved])],
        capture_output=True, text=True, cwd=copied, env=environment(copied), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in (
        "model.family='neo': there is no such family; did you mean 'neox'?; use llama, neox",
        "data.source='tsv': there is no such source; did you mean 'csv'?; use chat, csv, datatrove, huggingface, ",
        "unknown key 'data.packages' (found ['torch']); keys of data: ",
        "unknown key 'model.n_experts'",
        "unknown key 'optimizer.beta1' (found 0.5); keys of optimizer: ",
    ):
        assert told in done.stdout


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "kernels")))}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "data.source=jsnl",
            r"data\.source='jsnl': there is no such source; did you mean 'jsonl'\?; use chat, datatrove, ",
        ),
        ("data.source=[1]", r"data\.source=\[1\]: there is no such source; use chat, datatrove, huggingface"),
        ("data.source=null", r"data\.source=None: there is no such source; use chat, datatrove, huggingface"),
        ("model.family=lama", r"model\.family='lama': Input should be 'llama'"),
        (
            "data.text_field=body",
            r"^unknown key 'data\.text_field' \(found 'body'\); keys of data: document_mask, cache_dir, ",
        ),
        ("data.files=x.txt", r"^unknown key 'data\.files' \(found 'x\.txt'\)"),
    ],
)
def test_what_a_member_does_not_know_is_refused_by_name(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose([override])


ODD = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan"), "", "x", "\0",
    "[", "**", "~nobody/x", "/dev/null", "x" * 5000, "\ud800", [], ["a"], [[]], {}, {"a": 1}, {"name": "llama"},
]  # fmt: skip


@pytest.mark.parametrize("group", ["model", "data"])
def test_odd_settings_are_taken_or_refused_by_name(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in a setting of a model or a source: a plan and a source, or a message; never another error."""
    tree = compose(["trainer.precision=32-true"]).model_dump(mode="json")
    members = [tree["model"]] if group == "model" else [
        {"source": "text", "files": "x"},  {"source": "stdlib"},
        {"source": "python_env", "packages": "einops"}, {"source": "huggingface", "path": "nobody/nothing"},
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    taken = refused = 0
    for member in members:
        for key in fields_at(Config, [group]):
            for value in ODD:
                settings = {"val_tokens": 64, key: value} if group == "data" else {key: value}
                try:
                    config = parse(Config, tree | {group: member | settings})
                    make_plan(config)
                    config_hash(config)
                    if group == "data" and key not in DataSettings.model_fields:
                        config.data.open()
                    taken += 1
                except UserError as error:
                    refused += 1
                    assert len(str(error)) < 12_000
    assert taken > 50 and refused > 100
