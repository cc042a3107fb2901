"""Errors and endings that the command line knows by name, and how foreign errors become one."""

from __future__ import annotations

import errno
import importlib.util
import re
import shlex
import sys
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # not tab, newline


def visible(text: str) -> str:
    """Text with its control characters written out (ESC as \\x1b): what a file or a model says must not reach a
    terminal as commands, nor reverse the direction of what is read. Halves of surrogate pairs are written out too:
    no terminal takes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class UserError(ValueError):
    """What was asked, what was found, what to do. The command line prints it without a traceback and exits with 2."""

    def __str__(self) -> str:
        return visible(super().__str__())


class DivergedError(UserError):
    """The loss is not finite."""


class RefusedError(UserError):
    """Rank 0 does not go on, and says why. The other ranks end with this, silently."""


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop, and has saved. exit_code: what the process ends with, see `qtrain.training.stop`."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


class LostRankError(StoppedError):
    """Another process of the run has ended before this one, or does not answer. how: in one line."""

    def __init__(self, exit_code: int, how: str):
        super().__init__(exit_code)
        self.how = how


def first_line(error: BaseException) -> str:
    """A foreign exception in one line: its type and the first line of its text, which may repeat all of its input."""
    lines = visible(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


REMEDIES = {
    errno.ENOSPC: "free space there, or name a folder on another disk; the same command then goes on",
    errno.EDQUOT: "your quota there is used up: free space, or name a folder on another disk",
    errno.EFBIG: "a file there may not grow further: see `ulimit -f`, or name a folder on another disk",
    errno.EROFS: "the disk is mounted read-only: name a folder on another disk",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EPERM: "give yourself the right to it, or name another place",
    errno.ENOENT: "it was there before, or is expected to be: restore it, or name another place",
    errno.EISDIR: "a file is expected there: move the folder away, or name another place",
    errno.ENOTDIR: "a folder is expected above it: move the file away, or name another place",
    errno.EEXIST: "move it away, or name another place",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its links lead back to themselves: remove the link, or name another place",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.EIO: "the disk fails to read or write: copy what is there to another one",
}


def explain(error: OSError) -> UserError:
    """An error of the file system as a message: which file, what happened, what to do."""
    remedy = REMEDIES.get(error.errno or 0, "see that the place can be read and written")
    where = f" {error.filename}" if error.filename else ""
    return UserError(f"the file system refused{where}: {error.strerror or first_line(error)}; {remedy}")


# What `convert` does without -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "lightning": "train",
    "hydra": "train",
    "omegaconf": "train",
    "tokenizers": "train",
    "jinja2": "train",
    "safetensors": "train",
    "matplotlib": "report",
    "scipy": "report",
    "pyarrow": "report",
    "datasets": "data",
    "huggingface_hub": "data",
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_submitit_launcher": "sweep",
    "wandb": "wandb",
    "wandb_workspaces": "dashboard",
    "tensorboard": "tensorboard",
    "transformers": "hf",
    "torchao": "adamw8bit",
    "compressed_tensors": "export",
    "gguf": "export",
    "accelerate": "hf",
    "lm_eval": "eval",
}


def install(extra: str) -> str:
    """The command that adds an extra to this installation: to a checkout, or else to the package that is installed."""
    root = Path(__file__).parents[1]
    is_checkout = (root / "pyproject.toml").is_file()
    what = ["-e", f"{root}[{extra}]"] if is_checkout else [f"qtrain[{extra}]"]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def need(module: str, purpose: str, instead: str = "") -> None:
    """UserError where a package of an extra is not installed. purpose: what it is for, as the subject of a sentence;
    instead: what does without."""
    if not is_installed(module):
        raise UserError(
            f"{purpose} needs the package {module}: {install(EXTRAS[module])}{instead and f', or {instead}'}"
        )


def explain_missing(error: ModuleNotFoundError) -> UserError:
    """A package that is not installed, as a message. Raises the error itself where no extra of qtrain brings it."""
    module = (error.name or "").split(".")[0]
    if module not in EXTRAS:
        raise error
    return UserError(f"this needs the package {module}: {install(EXTRAS[module])}")
