"""The command qtrain: its sub-commands answer at once, say what is missing, and tell what a machine has."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import qtrain
from qtrain.cli import COMMANDS, main, start, this_command
from qtrain.cli.doctor import SETTINGS
from qtrain.errors import EXTRAS, UserError, explain_missing, install, need
from qtrain.train import checked_overrides
from qtrain_kernels import dispatch, gemm, gpu

ROOT = Path(__file__).parents[1]


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/qtrain", *arguments])
    return main()


def in_a_process(code: str) -> str:
    setup = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "near"), [("trian", "'train'"), ("docter", "'doctor'"), ("--helpp", ""), ("", "")])
def test_an_unknown_command_is_told_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, near: str
) -> None:
    assert called(monkeypatch, *([name] if name else [])) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and (f"did you mean {near}?" in told) == bool(near)
    assert all(f"  {command} " in told for command in COMMANDS)


def test_every_help_is_answered_without_heavy_imports() -> None:
    """And shows how it was called: by `qtrain`."""
    code = f"""
from qtrain.cli import main
for name in {list(COMMANDS)}:
    sys.argv = ["qtrain", name, "--help"]
    try:
        assert main() == 0
    except SystemExit as end:
        assert not end.code
    print(f"=== {{name}} {{sorted({{'torch', 'lightning', 'matplotlib', 'scipy', 'datasets'}} & set(sys.modules))}}")
"""
    shown = in_a_process(code)
    parts = re.split(r"=== (\w+) (.*)\n", shown)[:-1]
    assert parts[1::3] == list(COMMANDS) and set(parts[2::3]) == {"[]"}
    for name, text in zip(parts[1::3], parts[0::3], strict=True):
        assert f"qtrain {name} " in text and "scripts/" not in text and "train.py" not in text.split("Often set")[0], (
            name
        )


def test_a_command_is_told_as_one_would_type_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qtrain report", "my runs", "--out", "a.html"])
    assert this_command() == "qtrain report 'my runs' --out a.html"
    monkeypatch.setattr(sys, "argv", ["scripts/report.py", "runs"])
    assert this_command() == "python scripts/report.py runs"


@pytest.mark.parametrize("module", ["qtrain", "qtrain.cli"])
def test_python_m_is_the_command(module: str) -> None:
    code = f"""
import runpy
sys.argv = ["-m", "compare", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
"""
    assert in_a_process(code).startswith("usage: qtrain compare ")


def test_processes_of_other_devices_start_the_same_command() -> None:
    """Lightning starts `python -m` what __main__ says that it is, with the arguments."""
    code = """
sys.argv = ["/somewhere/bin/qtrain", "train", "--version"]
from qtrain.cli import main
main()
print(sys.modules["__main__"].__spec__.name, sys.argv[1:])
"""
    assert in_a_process(code).splitlines()[-1] == "qtrain.cli.train ['--version']"


# -------------------------------------------------------------------------------------------------------------- extras


def test_each_package_of_an_extra_is_in_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {extra: {normal(re.split(r"[^\w.-]", line)[0]) for line in lines} for extra, lines in extras.items()}
    owners = importlib.metadata.packages_distributions()
    for module, extra in EXTRAS.items():
        names = [module.rpartition(".")[2]] if "." in module else owners.get(module, [module])
        assert set(map(normal, names)) & brought[extra], module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_missing_extra_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install("hf").endswith(f" -m pip install -e '{ROOT}[hf]'")
    error = ModuleNotFoundError("No module named 'datasets.x'", name="datasets.x")
    assert str(explain_missing(error)) == f"this needs the package datasets: {install('data')}"
    with pytest.raises(ModuleNotFoundError):  # a defect, or the user's own
        explain_missing(ModuleNotFoundError("No module named 'mine'", name="mine"))
    monkeypatch.setattr("qtrain.errors.__file__", str(tmp_path / "site-packages" / "qtrain" / "errors.py"))
    assert install("hf") == f"{sys.executable} -m pip install 'qtrain[hf]'", "of an installed package"

    def lacks(name: str) -> None:
        if name.startswith("hydra_plugins."):
            raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", lacks)
    for option in ("local", "slurm", "slurm_local", "submitit_slurm"):
        with pytest.raises(UserError, match=rf"^hydra/launcher={option} needs the package hydra_plugins.*\[sweep\]'$"):
            checked_overrides(["-m", f"hydra/launcher={option}"])
    assert checked_overrides(["hydra/launcher=basic"]) == ["hydra/launcher=basic"]
    with pytest.raises(UserError, match=r"^x needs the package wandb: .*\[wandb\]', or y$"):
        need("wandb", "x", "y")
    monkeypatch.setitem(sys.modules, "qtrain.report.page", None)
    monkeypatch.setattr(sys, "argv", ["qtrain report", "runs", "--out", "a.html"])
    with pytest.raises(ModuleNotFoundError):
        start("report")
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------- doctor


def test_the_doctor_says_what_each_recipe_runs_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the dispatcher and the table of products decide; the slow way where there is no compiler, with the reason."""
    monkeypatch.setattr("qtrain_kernels.dispatch._cpp_obstacle", lambda: "no C++ compiler was found; install g++")
    monkeypatch.setattr(logging.getLogger("qtrain"), "handlers", [])  # those of a run in this process show on stdout
    dispatch.resolve.cache_clear()
    try:
        assert called(monkeypatch, "doctor", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert called(monkeypatch, "doctor") == 0
        shown = capsys.readouterr().out
    finally:
        dispatch.resolve.cache_clear()
    assert found["devices"]["cpu"]["backends"]["auto"] == "reference" and found["devices"]["cpu"]["trial"] == "passed"
    assert "compiled: no C++ compiler was found; install g++" in shown
    table = found["recipes"]["cpu"]
    assert list(table) == list(qtrain.recipes()) and table["bf16"]["gemms"] == {}
    assert table["halo_1"]["gemms"] == {"auto": ["int8"] * 3}
    assert table["mxfp8"]["gemms"]["auto"] == ["float"] * 3
    assert "needs a CUDA device of compute capability 10.0 or later; found cpu" in table["mxfp8"]["gemms"]["fp4"]
    assert re.search(r"(?m)^mxfp8 .*float .*fp8_block .*no \(\d\)", shown)
    assert all(each["path"] and each["obstacle"] is None for each in found["folders"]), found["folders"]


def test_the_doctor_on_a_card_tells_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.cli.doctor import recipes

    capability = (8, 9)
    monkeypatch.setattr(dispatch, "obstacle", lambda backend, device: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    dispatch.resolve.cache_clear()
    try:
        ada, capability = recipes("cuda"), (10, 0)
        from qtrain.quant import functional

        functional._product.cache_clear()
        blackwell = recipes("cuda")
    finally:
        dispatch.resolve.cache_clear()
        functional._product.cache_clear()
    assert ada["quartet"]["backend"] == "triton" and ada["quartet"]["gemms"]["fp8"] == ["fp8"] * 3
    assert "needs a CUDA device of compute capability 10.0" in ada["quartet"]["gemms"]["fp4"]
    assert blackwell["quartet"]["gemms"]["fp4"] == ["mxfp4"] * 3
    assert blackwell["quartet_ii"]["gemms"]["fp4"] == ["nvfp4"] * 3
    assert "backend 'triton' needs a rotation" in ada["halo_2"]["backend"] or ada["halo_2"]["backend"] == "triton"


def test_what_the_doctor_tries_fails_where_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.cli.doctor import trial

    assert SETTINGS[0] == "auto" and set(SETTINGS) <= set(gemm.SETTINGS) and gpu.KNOWS
    monkeypatch.setitem(dispatch.MODULES, "reference", broken(dispatch.MODULES["reference"]))
    assert "please report it" in trial("cpu")


def broken(module: Any) -> Any:
    """A backend whose rotations are off by a bit."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        @staticmethod
        def unrotate(x: Any, *arguments: Any, **named: Any) -> Any:
            return module.unrotate(x, *arguments, **named) * (1 + 2**-20)

    return Broken()
