"""What this machine has, what is installed, and on what each recipe runs here. For oneself, and for reports of defects.

qtrain doctor           tables
qtrain doctor --json    the same, for a report

Nothing is changed, but that kernels are compiled into their cache. The exit code is 1 if qtrain cannot run here, which
a layer of recipe quartet tries out on each device: forward, backward, and equal to the reference bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli import command_parser
from qtrain.errors import EXTRAS, first_line, install, is_installed, visible

if TYPE_CHECKING:
    from rich.table import Table

VERSIONS = (
    "torch", "triton", "torchao", "numpy", "pydantic", "lightning", "hydra-core", "datasets", "tokenizers",
    "transformers", "accelerate", "matplotlib", "scipy", "pyarrow", "wandb",
)  # fmt: skip
UNITS = (
    "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx_ne_convert", "amx_int8", "amx_bf16", "amx_fp16", "neon",
    "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
SETTINGS = ("auto", "fp8", "fp4")  # of gemm: the one in force, and those that one may ask for


def main() -> int:
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    as_json = parser.parse_args().json
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 1 if any(device["trial"] != "passed" for device in found["devices"].values()) else 0


# ------------------------------------------------------------------------------------------------------------- finding


def examine() -> dict[str, Any]:
    """Everything, as plain data."""
    import qtrain  # noqa: F401, I001  before torch: it sets how long torch's threads spin
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "qtrain": {"version": importlib.metadata.version("qtrain"), "place": str(Path(__file__).parents[1])},
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "processor": processor(),
        "compiler": compiler(),
        "gpu": gpus(),
        "memory": memory(),
        "versions": {name: version(name) for name in VERSIONS},
        "extras": extras(),
        "devices": {device: {"backends": backends(device), "trial": trial(device)} for device in devices},
        "recipes": {device: recipes(device) for device in devices},
        "folders": list(folders()),
    }


def processor() -> dict[str, Any]:
    import torch

    from qtrain.runs.environment import environment
    from qtrain_kernels.precision import has_bfloat16_units

    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found = environment()
    return {
        "name": found["processor"],
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "units": [unit for unit in UNITS if known.get(unit)],
        "lacks": [unit for unit in UNITS if known.get(unit) is False],
        "precision": "bf16-mixed" if has_bfloat16_units("cpu") else "32-true",
    }


def compiler() -> str:
    from qtrain_kernels import cpu

    try:
        path = cpu.compiler()
    except RuntimeError as error:
        return f"none: {error}"
    return f"{path}: {cpu.compiler_version(path).splitlines()[0]}"


def gpus() -> list[str] | str:
    """A line each, or why there is none."""
    import torch

    if not torch.backends.cuda.is_built():
        return "none: this torch is built for the CPU alone"
    if not torch.cuda.is_available():
        return f"none: this torch is built for CUDA {torch.version.cuda}, and finds no device that its driver can use"
    found = []
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        size = f"{device.total_memory / 2**30:.0f} GiB"
        found.append(
            f"{device.name}, compute capability {device.major}.{device.minor}, {size}, CUDA {torch.version.cuda}"
        )
    return found


def memory() -> dict[str, float]:
    """In GiB. available: what new programs can take without swapping; only Linux tells."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = {"total": page * os.sysconf("SC_PHYS_PAGES") / 2**30}
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return found | ({"available": int(available) / 2**20} if available else {})


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, dict[str, Any]]:
    """extra -> the packages that it lacks, and the command that brings them."""
    found: dict[str, dict[str, Any]] = {}
    for module, extra in EXTRAS.items():
        entry = found.setdefault(extra, {"missing": []})
        if not is_installed(module):
            entry["missing"].append(module)
    return {extra: entry | ({"install": install(extra)} if entry["missing"] else {}) for extra, entry in found.items()}


def backends(device: str) -> dict[str, str]:
    """auto -> what it is, and every backend -> "works", or why it does not."""
    from qtrain_kernels import dispatch

    names = [name for name in dispatch.BACKENDS if name != "auto"]
    found = {name: dispatch.obstacle(name, device) or "works" for name in names}
    return {"auto": dispatch.resolve("auto", device), **found}


def trial(device: str) -> str:
    """passed, or what went wrong."""
    import torch

    from qtrain.quant import convert, set_step

    def gradients(backend: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).to(device)
        convert(model, "quartet", backend=backend)
        set_step(model, 0)
        x = torch.randn(32, 64).to(device)
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    try:
        fast, exact = gradients("auto"), gradients("reference")
    except Exception as error:  # whatever it is, it is what this command is to tell
        return first_line(error)
    equal = len(fast) == len(exact) == 4 and all(map(torch.equal, fast, exact))
    return "passed" if equal else "backend auto gives other gradients than the reference; please report it"


def recipes(device: str) -> dict[str, dict[str, Any]]:
    """recipe -> backend: what quantises; gemms: by each setting of gemm, how fprop, dgrad and wgrad are multiplied;
    without a setting that changes nothing for the recipe."""
    from qtrain.config.recipe import read_recipe
    from qtrain.config.settings import group_names

    return {name: _recipe(read_recipe(name), device) for name in group_names("recipe")}


def _recipe(recipe: Any, device: str) -> dict[str, Any]:
    from qtrain.quant.convert import multiplies
    from qtrain.quant.functional import Numerics
    from qtrain_kernels import dispatch, gpu

    if recipe.fprop is None:
        return {"backend": "none", "gemms": {}}
    numerics = Numerics.build(recipe, "auto")
    backend = dispatch.resolve("auto", device)
    reasons = []
    if backend == "triton":
        reasons = [
            gpu.missing_kernel(each.plan, each.rotation_block or None, each.tile[0])
            for each in numerics.operands.values()
        ]
    gaps = list(dict.fromkeys(reason for reason in reasons if reason))
    told = f"{backend}, and reference where {'; '.join(gaps)}" if gaps else backend
    gemms = {}
    for setting in SETTINGS:
        asked = Numerics.build(recipe, "auto", setting)
        if setting == "auto" or multiplies(asked, setting):
            gemms[setting] = _products(asked, device)
    return {"backend": told, "gemms": gemms}


def _products(numerics: Any, device: str) -> list[str] | str:
    """Of fprop, dgrad and wgrad; or why the device cannot."""
    from qtrain.quant.functional import OPERANDS

    try:
        return [numerics.product(name, device).name for name in OPERANDS]
    except ValueError as error:
        return str(error)


def folders() -> Iterator[dict[str, Any]]:
    """Where qtrain writes: purpose, path, free (GiB) and what is in the way of writing there, None for nothing."""
    from qtrain.config import Config
    from qtrain.data.base import DataSettings
    from qtrain_kernels import kernel_cache

    yield _folder("runs, of a command in this folder", Path(Config.model_fields["run_root"].default or "runs"))
    yield _folder("token shards, of a command in this folder", Path(DataSettings.model_fields["cache_dir"].default))
    try:
        yield _folder("compiled kernels", kernel_cache.folder())
    except RuntimeError as error:
        yield {"purpose": "compiled kernels", "path": None, "free": None, "obstacle": str(error)}
    yield _folder("Triton's kernels", Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser())
    yield _folder("Hugging Face", Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser())


def _folder(purpose: str, path: Path) -> dict[str, Any]:
    path = path.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    obstacle = None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else f"cannot write to {there}"
    free = shutil.disk_usage(there).free / 2**30
    return {"purpose": purpose, "path": str(path), "free": free, "obstacle": obstacle}


# ------------------------------------------------------------------------------------------------------------- showing


def show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    for table in (machine(found), installed(found), places(found), *by_recipe(found)):
        console.print(table, "")
    for device, entry in found["devices"].items():
        console.print(f"trial of recipe quartet on {device}: {entry['trial']}")


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    return Table(
        *columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=bool(columns[0])
    )


def machine(found: dict[str, Any]) -> Table:
    table = _table("machine", "", "")
    own = found["processor"]
    units = ", ".join(own["units"]) or "none that torch names"
    size = found["memory"]
    available = f", {size['available']:.1f} GiB available" if "available" in size else ""
    gpu = found["gpu"]
    rows = {
        "qtrain": f"{found['qtrain']['version']} in {found['qtrain']['place']}",
        "python": found["python"],
        "platform": found["platform"],
        "processor": f"{own['name']}: {own['cores']} cores, {own['threads']} threads; torch uses {own['torch uses']}",
        "its units": f"{units}; not {', '.join(own['lacks'])}" if own["lacks"] else units,
        "trainer.precision=auto": f"{own['precision']} on the CPU",
        "C++ compiler": found["compiler"],
        "GPU": gpu if isinstance(gpu, str) else "\n".join(gpu),
        "memory": f"{size['total']:.1f} GiB{available}",
    }
    for name, text in rows.items():
        table.add_row(name, visible(text))
    for device, entry in found["devices"].items():
        auto, *others = entry["backends"].items()
        refused = "".join(f"\n{name}: {why}" for name, why in others if why != "works" and _is_faster(name, device))
        table.add_row(f"backend=auto on {device}", f"{auto[1]}{refused}")
    return table


def _is_faster(backend: str, device: str) -> bool:
    from qtrain_kernels import dispatch

    return dispatch.FASTEST[device] == backend


def installed(found: dict[str, Any]) -> Table:
    table = _table("installed", "", "")
    have = [f"{name} {number}" for name, number in found["versions"].items() if number]
    lack = [name for name, number in found["versions"].items() if not number]
    table.add_row("packages", ", ".join(have))
    if lack:
        table.add_row("not there", ", ".join(lack))
    for extra, entry in found["extras"].items():
        lacks = entry["missing"]
        table.add_row(f"extra {extra}", f"lacks {', '.join(lacks)}: {entry['install']}" if lacks else "complete")
    return table


def places(found: dict[str, Any]) -> Table:
    table = _table("folders", "", "path", "free", "")
    for each in found["folders"]:
        free = "" if each["free"] is None else f"{each['free']:.0f} GiB"
        table.add_row(each["purpose"], visible(str(each["path"] or "")), free, visible(each["obstacle"] or "writable"))
    return table


def by_recipe(found: dict[str, Any]) -> Iterator[Any]:
    """A table for each device, and under it the reasons that its numbers stand for."""
    for device, entries in found["recipes"].items():
        table = _table(
            f"products of fprop, dgrad, wgrad on {device}", "recipe", "backend", *(f"gemm={name}" for name in SETTINGS)
        )
        table.columns[0].no_wrap = True
        reasons: dict[str, int] = {}

        def cell(products: list[str] | str | None, reasons: dict[str, int] = reasons) -> str:
            if products is None:
                return "as auto"
            if isinstance(products, str):
                return f"no ({reasons.setdefault(products, len(reasons) + 1)})"
            return products[0] if len(set(products)) == 1 else " ".join(products)

        for name, entry in entries.items():
            if entry["gemms"]:
                table.add_row(name, entry["backend"], *(cell(entry["gemms"].get(setting)) for setting in SETTINGS))
            else:
                table.add_row(name, entry["backend"])
        yield table
        if device == "cpu":
            yield "On a CPU, an FP8 product is a float32 product of what FP8 units would multiply, and no faster."
        for reason, number in reasons.items():
            yield f"({number}) {reason}"
