"""What a user installs: the wheel holds both packages and the configs, and works away from the repository."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, pythonpath: list[Path] | None = None) -> str:
    """Standard output; an error shows what the command wrote."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, pythonpath or []))}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, so that the archive is known to be complete."""
    folder = tmp_path_factory.mktemp("build")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("qtrain-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (built,) = folder.glob("qtrain-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_packages_and_every_config_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    found = {name for name in names if not re.match(r"qtrain-[^/]*\.dist-info/", name)}
    expected = {f"qtrain/{path.relative_to(ROOT / 'qtrain').as_posix()}" for path in (ROOT / "qtrain").rglob("*.py")}
    kernels = ROOT / "kernels"
    expected |= {path.relative_to(kernels).as_posix() for path in (kernels / "qtrain_kernels").rglob("*.py")}
    expected |= {"qtrain_kernels/cpu.cpp", "qtrain_kernels/few_rows.cpp", "qtrain/report/page.html"}
    expected |= {f"qtrain/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert found == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_finds_its_configs(site, tmp_path):
    code = (
        "from qtrain.config import recipe, settings; print(settings.__file__); print(*settings.group_names('recipe'));"
    )
    code += "recipe.read_recipe('bf16')"
    place, recipes = run(sys.executable, "-c", code, cwd=tmp_path, pythonpath=[site]).splitlines()
    assert Path(place).is_relative_to(site)
    assert recipes.split() == sorted(path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml"))


def test_the_installed_command_explains_itself(site, tmp_path):
    shown = run(site / "bin" / "qtrain", "train", "--help", cwd=tmp_path, pythonpath=[site])
    assert all(path.stem in shown for path in (ROOT / "configs" / "recipe").glob("*.yaml"))
    assert "qtrain train +experiment=quartet " in shown and "train.py" not in shown


def test_the_installed_command_plans_a_run(site, tmp_path):
    run(site / "bin" / "qtrain", "train", "+experiment=quartet", "dry_run=true", cwd=tmp_path, pythonpath=[site])
    assert list(tmp_path.iterdir()) == []


def brought_by_the_package_alone() -> set[str]:
    """The top-level modules of the distributions that `pip install qtrain` brings, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, found = [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]], set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    owners = importlib.metadata.packages_distributions()
    return {top for top, names in owners.items() if {re.sub(r"[-_.]+", "-", name).lower() for name in names} & found}


LIGHT = """
import importlib.metadata, sys

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Bare, sys.meta_path)
import qtrain, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
print(qtrain.convert(model, "quartet_v1", backend="reference"))
qtrain.set_step(model, 0)
model(torch.ones(32, 64)).sum().backward()
assert model[0].weight.grad.norm() > 0 and qtrain.recipes()
qtrain.fake_quantize(torch.ones(4, 32), "mxfp4", backend="reference")
try:
    qtrain.load_run("runs/x")
except qtrain.errors.UserError as error:
    print(error)
assert not absent & {name.split(".")[0] for name in sys.modules}
from qtrain.cli import main
for words in (["recipes"], ["doctor", "--json"], ["train", "dry_run=true"], ["report", "runs", "--out", "a.html"]):
    sys.argv = ["qtrain", *words]
    print(words[0], "->", main())
"""


def test_the_package_alone_converts_and_names_the_extra_for_all_else(tmp_path):
    """All that only extras bring is hidden, as in an environment without them."""
    brought = brought_by_the_package_alone()
    assert {"torch", "pydantic", "yaml", "rich", "numpy"} <= brought
    absent = set(importlib.metadata.packages_distributions()) - brought - {"qtrain", "qtrain_kernels"}
    assert {"lightning", "hydra", "datasets", "matplotlib", "scipy", "pyarrow", "transformers"} <= absent
    code = f"absent = {set(absent)}\n{LIGHT}"
    command = [sys.executable, "-c", code]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CXX": "no-compiler"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 linear layers converted" in done.stdout and re.search(r"the package \w+: .*\[train\]", done.stdout)
    codes = dict(re.findall(r"(?m)^(\w+) -> (\d)$", done.stdout))
    assert codes == {"recipes": "0", "doctor": "0", "train": "2", "report": "2"}
    told = re.findall(r"error: this needs the package (\w+): .*\[(\w+)\]", done.stderr)
    assert told == [("hydra", "train"), ("matplotlib", "report")], done.stderr


def test_the_name_kernels_is_left_to_the_package_that_owns_it(tmp_path):
    """Our folder of that name, on the path through an editable install or the repository root, must not hide it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    code = "import kernels, qtrain_kernels; assert kernels.get_kernel, kernels.__path__"
    run(sys.executable, "-c", code, cwd=ROOT, pythonpath=[ROOT, ROOT / "kernels", tmp_path])


def test_torchs_threads_spin_briefly_unless_the_user_says_otherwise() -> None:
    """OpenMP tells what it has read when torch was imported; GCC's is that of torch's wheels for Linux."""

    def spins(**setting: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | setting
        command = [sys.executable, "-c", "import qtrain; qtrain.convert"]
        environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)

    found = spins()
    if not found:
        pytest.skip("torch here does not use GCC's OpenMP, whose setting this is")
    assert set(found) == {"10000"}
    assert set(spins(GOMP_SPINCOUNT="77")) == {"77"}
