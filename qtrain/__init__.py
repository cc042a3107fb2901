"""Low-precision training of language models: quantise any nn.Module by recipe, train it, and tell what it cost.

report = qtrain.convert(model, recipe="quartet")
qtrain.set_step(model, step)                       # before each forward of a stochastic recipe
x_hat = qtrain.fake_quantize(x, "mxfp4")
model = qtrain.load_run("runs/quartet-1a2b3c4d")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import qtrain_kernels  # noqa: F401  before torch: it sets how long torch's threads spin
from qtrain.errors import explain_missing

if TYPE_CHECKING:
    __version__: str
    from qtrain.quant import calibrate, convert, fake_quantize, keep_weights, pack, recipes, set_step
    from qtrain.training.build import load_run

__all__ = ["calibrate", "convert", "fake_quantize", "keep_weights", "load_run", "pack", "recipes", "set_step"]

_HOME = {name: "qtrain.training.build" if name == "load_run" else "qtrain.quant" for name in __all__}


def __getattr__(name: str) -> Any:
    """Imported on first use: `import qtrain` alone brings in neither torch nor Lightning."""
    if name == "__version__":
        return version("qtrain")
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:  # load_run needs what trains
            raise explain_missing(error) from None
    raise AttributeError(f"module 'qtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
