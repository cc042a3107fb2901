"""Lower never imports higher: every import of the project is checked against one table, read from the syntax tree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module or package -> what it may import beside the standard library, itself, qtrain.errors and qtrain.units; the
# longest key that matches decides. In parentheses: only lazily (inside functions, or for types alone), so that
# importing the module neither needs it nor pays for it.
MAY_IMPORT = {
    "qtrain_kernels": (
        "torch qtrain_kernels.formats qtrain_kernels.plans "
        "(triton qtrain_kernels.triton_few_rows qtrain_kernels.triton_quantize)"
    ),
    "qtrain_kernels.formats": "",
    "qtrain_kernels.plans": "qtrain_kernels.formats (torch)",
    "qtrain_kernels.triton_quantize": "triton qtrain_kernels.triton_interpreter",
    "qtrain_kernels.triton_few_rows": "triton qtrain_kernels.triton_quantize",
    "qtrain_kernels.triton_interpreter": "numpy torch triton",
    "qtrain": "qtrain_kernels qtrain.errors (qtrain.quant qtrain.training.build)",
    "qtrain.errors": "",
    "qtrain.units": "",
    "qtrain.config": (
        "yaml pydantic qtrain.config.settings qtrain_kernels.formats qtrain_kernels.plans "
        "(qtrain.optim qtrain.models.base qtrain.data.base)"
    ),
    "qtrain.config.settings": "pydantic (qtrain_kernels.formats)",
    "qtrain.optim": "pydantic qtrain.config.settings (torch)",
    "qtrain.optim.groups": "torch qtrain.optim",
    "qtrain.optim.optimizers.adamw8bit": "pydantic qtrain.optim qtrain.optim.base (torch qtrain.optim.blockwise)",
    "qtrain.optim.blockwise": "torch torchao",
    "qtrain.quant": (
        "torch qtrain.config qtrain.config.settings qtrain_kernels qtrain_kernels.formats qtrain_kernels.plans"
    ),
    "qtrain.integrations": "torch qtrain.quant",
    "qtrain.integrations.transformers": "torch transformers qtrain.quant",
    "qtrain.integrations.accelerate": "torch qtrain.quant",
    "qtrain.integrations.lm_eval": "torch jinja2 yaml lm_eval qtrain.evaluate qtrain.models qtrain.quant",
    "qtrain.models": "torch einops qtrain.models.base qtrain_kernels",
    "qtrain.models.hf_config": "pydantic (huggingface_hub)",
    "qtrain.models.base": "pydantic qtrain.config.settings (torch qtrain.models.hf_config)",
    "qtrain.models.hf": (
        "torch safetensors qtrain.models qtrain.models.base qtrain.models.hf_config qtrain.runs (huggingface_hub)"
    ),
    "qtrain.models.gguf": (
        "numpy torch (gguf) qtrain.config.settings qtrain.models qtrain.models.families qtrain.models.hf"
    ),
    "qtrain.models.families": "pydantic qtrain.models.base (torch qtrain.models qtrain_kernels)",
    "qtrain.metrics": "qtrain.models qtrain.models.base",
    "qtrain.plan": ("torch rich qtrain.config qtrain.config.settings qtrain.models qtrain.metrics qtrain_kernels"),
    "qtrain.data": (
        "numpy torch pydantic tokenizers filelock rich (huggingface_hub jinja2 transformers) qtrain.config "
        "qtrain.config.settings qtrain.data.base qtrain.data.counted qtrain.data.files qtrain.data.sources qtrain.runs"
    ),
    "qtrain.data.counted": "",
    "qtrain.data.batches": "numpy torch qtrain.data",
    "qtrain.data.base": "pydantic qtrain.config.settings",
    "qtrain.data.files": "pydantic qtrain.data.base (numpy)",
    "qtrain.data.sources": (
        "pydantic qtrain.config.settings qtrain.data.base qtrain.data.files (datasets numpy pyarrow)"
    ),
    "qtrain.runs": "yaml pydantic (pyarrow) qtrain.config qtrain.config.settings",
    "qtrain.scaling": "numpy scipy yaml (pyarrow)",
    "qtrain.report": "numpy scipy matplotlib yaml (pyarrow) qtrain.config qtrain.runs qtrain.scaling",
    "qtrain.report.wandb_runs": "yaml (wandb) qtrain.runs",
    "qtrain.training": "",
    "qtrain.training.world": "qtrain.config",
    "qtrain.training.stop": "",
    "qtrain.training.losses": "torch qtrain.data.batches qtrain.data.counted qtrain.metrics qtrain.models",
    "qtrain.training.initialize": "torch",
    "qtrain.training.activations": "torch qtrain.config.settings qtrain.quant qtrain_kernels",
    "qtrain.training.checkpoint": "torch safetensors qtrain.runs",
    "qtrain.training.causal_lm": (
        "torch lightning qtrain.config qtrain.data.counted qtrain.plan qtrain.optim.groups qtrain.quant "
        "qtrain.training.losses qtrain.training.rows"
    ),
    "qtrain.training.build": (
        "torch qtrain.config qtrain.data qtrain.plan qtrain.models qtrain.models.hf qtrain.quant qtrain.runs "
        "qtrain.training.checkpoint qtrain.training.initialize qtrain.training.tune "
        "qtrain_kernels"
    ),
    "qtrain.training.rows": "torch qtrain.quant",
    "qtrain.training.moves": "torch qtrain.quant",
    "qtrain.training.tune": (
        "torch safetensors qtrain.config qtrain.models qtrain.models.hf qtrain.quant qtrain.runs "
        "qtrain.training.moves qtrain.training.rows"
    ),
    "qtrain.training.memory": (
        "torch qtrain.config qtrain.models qtrain.plan qtrain.quant qtrain.training.activations qtrain.training.build "
        "qtrain.training.causal_lm qtrain.training.parallel qtrain.training.tune"
    ),
    "qtrain.training.parallel": (
        "torch lightning qtrain.config qtrain.quant qtrain.training.initialize qtrain.training.stop "
        "qtrain.training.world"
    ),
    "qtrain.training.communication": (
        "torch qtrain.config qtrain.plan qtrain.quant qtrain.training.build qtrain.training.parallel"
    ),
    "qtrain.training.speed": (
        "torch qtrain.config qtrain.plan qtrain.quant qtrain.training.build qtrain.training.communication "
        "qtrain.training.losses"
    ),
    "qtrain.training.trunk": ("qtrain.config qtrain.plan qtrain.runs qtrain.training.checkpoint"),
    "qtrain.training.observers": (
        "torch lightning (wandb) safetensors rich qtrain.config qtrain.data.batches qtrain.metrics qtrain.quant "
        "qtrain.runs qtrain.training.causal_lm qtrain.training.checkpoint qtrain.training.losses "
        "qtrain.training.parallel (qtrain.evaluate qtrain.integrations.lm_eval)"
    ),
    "qtrain.training.divergence": "qtrain.training.causal_lm qtrain.training.parallel",
    "qtrain.training.saves": (
        "torch qtrain.runs qtrain.training.causal_lm qtrain.training.checkpoint qtrain.training.divergence "
        "qtrain.training.observers qtrain.training.parallel qtrain.training.trunk"
    ),
    "qtrain.training.loop": (
        "torch lightning qtrain.data.batches qtrain.training.causal_lm qtrain.training.divergence "
        "qtrain.training.observers qtrain.training.parallel qtrain.training.saves qtrain.training.stop"
    ),
    "qtrain.training.session": (
        "torch lightning rich qtrain.config qtrain.plan qtrain.optim.groups qtrain.models qtrain.models.hf "
        "qtrain.quant qtrain.data qtrain.data.batches qtrain.report qtrain.runs qtrain.training.activations "
        "qtrain.training.build "
        "qtrain.training.causal_lm qtrain.training.communication "
        "qtrain.training.checkpoint qtrain.training.divergence qtrain.training.loop qtrain.training.memory "
        "qtrain.training.observers qtrain.training.parallel qtrain.training.saves qtrain.training.stop "
        "qtrain.training.speed qtrain.training.trunk qtrain.training.tune "
        "qtrain.training.world (qtrain.evaluate)"
    ),
    "qtrain.multirun": "rich qtrain.config qtrain.config.settings qtrain.runs",
    "qtrain.export": (
        "numpy torch safetensors (compressed_tensors gguf) qtrain.config qtrain.data qtrain.models qtrain.models.hf "
        "qtrain.models.base qtrain.models.gguf qtrain.plan qtrain.quant qtrain.runs qtrain.training.build "
        "qtrain.training.checkpoint qtrain.training.tune qtrain_kernels "
        "qtrain_kernels.formats qtrain_kernels.plans"
    ),
    "qtrain.evaluate": (
        "torch (compressed_tensors transformers) qtrain.config qtrain.config.settings qtrain.data qtrain.data.base "
        "qtrain.data.batches qtrain.metrics qtrain.models qtrain.models.families qtrain.models.gguf qtrain.models.hf "
        "qtrain.models.hf_config qtrain.plan qtrain.runs qtrain.training.build qtrain.training.checkpoint "
        "qtrain.training.losses"
    ),
    "qtrain.post_training": (
        "torch safetensors yaml qtrain.config qtrain.config.settings qtrain.data qtrain.data.batches "
        "qtrain.data.counted qtrain.models qtrain.models.hf qtrain.plan qtrain.quant qtrain.runs qtrain.train "
        "qtrain.training qtrain.training.losses qtrain.training.checkpoint qtrain_kernels"
    ),
    "qtrain.studies": "",
    "qtrain.studies.chaos": "torch lightning qtrain qtrain.train qtrain.runs qtrain.config qtrain.config.settings",
    "qtrain.studies.stability": (
        "numpy scipy torch qtrain.data qtrain.data.batches qtrain.data.counted qtrain.plan qtrain.runs "
        "qtrain.training.build qtrain.training.checkpoint"
    ),
    "qtrain.sweep": (
        "rich qtrain.config qtrain.data qtrain.data.base qtrain.plan qtrain.runs "
        "qtrain.training.build qtrain.training.checkpoint qtrain.training.speed qtrain.training.session "
        "qtrain.training.trunk"
    ),
    "qtrain.__main__": "qtrain.cli",
    "qtrain.cli": "",
    "qtrain.cli.train": "(qtrain.train qtrain.training.stop)",
    "qtrain.cli.export": "qtrain.cli (qtrain.export)",
    "qtrain.cli.evaluate": (
        "qtrain.cli (qtrain.data.base qtrain.evaluate qtrain.integrations.lm_eval qtrain.runs qtrain.train)"
    ),
    "qtrain.cli.quantize": "qtrain.cli (qtrain.post_training)",
    "qtrain.cli.generate": (
        "qtrain.cli qtrain.data (torch qtrain.models qtrain.quant qtrain.runs qtrain.training.build)"
    ),
    "qtrain.cli.report": "qtrain.cli (qtrain.report)",
    "qtrain.cli.compare": "qtrain.cli (qtrain.report qtrain.runs)",
    "qtrain.cli.fit": "qtrain.cli qtrain.scaling (qtrain.report qtrain.runs)",
    "qtrain.cli.data": "qtrain.cli qtrain.config.settings (qtrain.data qtrain.plan qtrain.train)",
    "qtrain.cli.sweep": "yaml qtrain.cli (rich qtrain.report qtrain.runs qtrain.sweep qtrain.train)",
    "qtrain.cli.doctor": (
        "qtrain.cli (torch rich qtrain qtrain.config qtrain.config.settings qtrain.data.base qtrain.quant qtrain.runs "
        "qtrain_kernels)"
    ),
    "qtrain.cli.recipes": "qtrain.cli (qtrain.config qtrain.config.settings)",
    "qtrain.train": (
        "hydra omegaconf qtrain.config qtrain.config.settings "
        "qtrain.training.stop qtrain.training.world "
        "(qtrain.plan qtrain.training.session qtrain.multirun qtrain.runs rich)"
    ),
}
NOBODY_IMPORTS = {
    "kernels": "the name of another package; ours is qtrain_kernels",
    "train": "a command, not a module; its code is in qtrain.train",
    "scripts": "tools over qtrain",
    "experiments": "studies over qtrain",
    "tests": "tests",
}
LAYERS = {"qtrain": ROOT / "qtrain", "qtrain_kernels": ROOT / "kernels" / "qtrain_kernels"}


def rule_of(module: str) -> str | None:
    """The longest key of the table that is `module` or one of its parents; "qtrain" only for the package itself."""
    parts = module.split(".")
    keys = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((key for key in keys if key in MAY_IMPORT), None)


def imports(tree: ast.AST, lazily: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, imported name, whether lazily: inside a function, or under `if TYPE_CHECKING`).

    `from a import b` counts as a.b, a relative import as ".".
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "" if node.level else f"{node.module}."
            yield from ((node.lineno, f"{base}{alias.name}" if base else ".", lazily) for alias in node.names)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imports(node, lazily or function or for_types)


def allowed(module: str) -> tuple[set[str], set[str]]:
    """(at the top of the module, only inside functions), as rule keys and third-party packages."""
    key = rule_of(module)
    assert key is not None
    lazy = " ".join(re.findall(r"\((.*?)\)", MAY_IMPORT[key])).split()
    top = re.sub(r"\(.*?\)", "", MAY_IMPORT[key]).split()
    of_all = {"qtrain.errors", "qtrain.units"} if key.startswith("qtrain.") else set()
    if key in of_all:
        return {key}, set()
    return {key, *top} | of_all, set(lazy)


def layer_violations(module: str, path: str, source: str) -> list[str]:
    """Imports of a module of qtrain or qtrain_kernels that the table does not allow."""
    if module.startswith("qtrain.") and rule_of(module) == "qtrain":
        return [f"{path}:1: {module} has no line in MAY_IMPORT; add one"]
    top, lazy = allowed(module)
    found = []
    for line, name, lazily in imports(ast.parse(source)):
        root = name.split(".")[0]
        if root in sys.stdlib_module_names:
            continue
        target = (rule_of(name) or name) if root in LAYERS else root
        if name == ".":
            found.append(f"{path}:{line}: relative import; write the full name")
        elif target in lazy and not lazily and target not in top:
            found.append(f"{path}:{line}: {module} may import {target} only inside a function")
        elif target not in top | lazy:
            found.append(f"{path}:{line}: {module} may not import {target}; it may: {', '.join(sorted(top | lazy))}")
    return found


def common_violations(path: str, source: str) -> list[str]:
    """What no file of the project may do: import a tool, or swallow every exception."""
    tree = ast.parse(source)
    found = []
    for line, name, _ in imports(tree):
        root = name.split(".")[0]
        if root in NOBODY_IMPORTS:
            found.append(f"{path}:{line}: nobody imports {root} ({NOBODY_IMPORTS[root]})")
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    return found + [f"{path}:{node.lineno}: bare except; name the exceptions" for node in handlers]


def modules() -> dict[str, Path]:
    """{"qtrain.models.layers": path} of both packages."""
    found = {}
    for package, folder in LAYERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def project_files() -> list[Path]:
    folders = ("qtrain", "kernels", "scripts", "experiments", "tests")
    return [ROOT / "train.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def test_every_import_is_in_the_table():
    found = []
    for module, path in modules().items():
        found += layer_violations(module, str(path.relative_to(ROOT)), path.read_text())
    assert not found, "\n".join(found)


def test_nobody_imports_tools_and_no_except_is_bare():
    found = [
        line for path in project_files() for line in common_violations(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not found, "\n".join(found)


def test_a_line_of_the_table_points_only_downwards():
    """A cycle in the table would make "lower" and "higher" meaningless."""
    below = {key: set().union(*allowed(key)) - {key} for key in MAY_IMPORT}

    def walk(key: str, path: tuple[str, ...]) -> None:
        assert key not in path, f"cycle: {' -> '.join([*path, key])}"
        for target in below[key]:
            if target in MAY_IMPORT:
                walk(target, (*path, key))

    for key in MAY_IMPORT:
        walk(key, ())


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("qtrain.models.layers", "import torch\nfrom qtrain.quant import convert\n", 2),
        ("qtrain.models.layers", "import torch\nfrom qtrain import quant\n", 2),
        ("qtrain.models.layers", "def build():\n    import qtrain.quant.linear\n", 2),
        ("qtrain.models.layers", "from qtrain import convert\n", 1),
        ("qtrain.models.layers", "from . import attention\n", 1),
        ("qtrain.quant.linear", "import os\nfrom lightning.pytorch import Trainer\n", 2),
        ("qtrain.config", "import hydra\n", 1),
        ("qtrain.config", "from qtrain_kernels.reference import quantize\n", 1),
        ("qtrain.data.shards", "import lightning\n", 1),
        ("qtrain.data.shards", "from qtrain.data import batches\n", 1),
        ("qtrain.data.sources.huggingface", "try:\n    import datasets\nexcept ImportError:\n    datasets = None\n", 2),
        ("qtrain.training.loop", "def start():\n    import wandb\n", 2),
        ("qtrain.report.loss", "import torch\n", 1),
        ("qtrain.report.loss", "from qtrain.models.decoder import Decoder\n", 1),
        ("qtrain_kernels.gpu", "import triton\n", 1),
        ("qtrain", "if True:\n    from qtrain.quant import convert\n", 2),
        ("qtrain_kernels.gpu", "class Kernel:\n    import triton.language as tl\n", 2),
        ("qtrain_kernels.gpu", "from qtrain.errors import UserError\n", 1),
        ("qtrain_kernels.formats", "import torch\n", 1),
        ("qtrain.new_module", "import os\n", 1),
    ],
)
def test_a_forbidden_import_is_reported_with_its_place(module, source, line):
    (found,) = layer_violations(module, "some/file.py", source)
    assert found.startswith(f"some/file.py:{line}: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qtrain_kernels.gpu", "import math, torch\ndef launch():\n    import triton.language as tl\n"),
        ("qtrain", "if TYPE_CHECKING:\n    from qtrain.quant import convert\n"),
        ("qtrain.data.batches", "import torch\nfrom qtrain.data.shards import read\n"),
        ("qtrain.quant.linear", "from qtrain.quant import convert\nfrom qtrain_kernels import reference\n"),
    ],
)
def test_an_allowed_import_is_not_reported(module, source):
    assert layer_violations(module, "some/file.py", source) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import kernels\n", 1),
        ("import os\nfrom kernels.qtrain_kernels import formats\n", 2),
        ("from train import main\n", 1),
        ("def f():\n    from tests import conftest\n", 2),
        ("import scripts.prepare_data\n", 1),
        ("try:\n    pass\nexcept:\n    pass\n", 3),
    ],
)
def test_what_no_file_may_do_is_reported_with_its_place(source, line):
    (found,) = common_violations("some/file.py", source)
    assert found.startswith(f"some/file.py:{line}: ")


def test_folders_that_are_no_packages_have_no_init():
    folders = [
        ROOT / "kernels",
        ROOT / "scripts",
        *(p for p in (ROOT / "tests").rglob("*") if p.is_dir()),
        ROOT / "tests",
    ]
    assert [folder for folder in folders if (folder / "__init__.py").exists()] == []


def test_every_package_that_is_imported_is_a_declared_dependency():
    """A package that only another one brings along goes away when that one drops it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    declared = {normal(re.match(r"[\w.-]+", line).group()) for line in requirements}  # type: ignore[union-attr]
    named = {name for key in MAY_IMPORT for names in allowed(key) for name in names if name.split(".")[0] not in LAYERS}
    owners = importlib.metadata.packages_distributions()
    assert {name for name in named if not declared & set(map(normal, owners.get(name, [name])))} == set()


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after the statement."""
    code = f"import sys\nsys.path[:0] = {list(map(str, [ROOT, ROOT / 'kernels']))}\n{statement}\nprint(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent
    ).stdout
    return {name.split(".")[0] for name in out.split()}


def test_importing_qtrain_costs_nothing():
    heavy = {"torch", "numpy", "lightning", "hydra", "datasets", "transformers", "wandb", "matplotlib", "pydantic"}
    assert loaded_by("import qtrain") & heavy == set()


def test_exporting_and_quantising_need_no_trainer():
    """Lightning takes two seconds and 200 MiB, most of it transformers and scipy."""
    loaded = loaded_by("import qtrain.export.trained, qtrain.export.gguf, qtrain.post_training, qtrain.training.build")
    assert "torch" in loaded
    assert loaded & {"lightning", "transformers", "triton", "datasets"} == set()


def test_help_and_mistakes_are_answered_without_torch():
    assert loaded_by("import qtrain.train") & {"torch", "lightning", "datasets", "matplotlib"} == set()
