"""The command `qtrain`, and what all its sub-commands share. Each is a module of this package with a `main()`.

A sub-command reads sys.argv. Its module is imported when it is chosen, and imports what is heavy when it has read its
arguments, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from qtrain.errors import UserError, explain, explain_missing, visible

COMMANDS = {
    "train": "train a model by settings: +experiment=quartet; -m for several runs",
    "sweep": "plan, run and watch any number of runs",
    "report": "one page of runs: losses, gaps, laws, layers, speed",
    "compare": "a table of final losses and of their gaps to a baseline",
    "fit": "fit a scaling law to finished runs",
    "data": "tokenise a corpus ahead of time, or verify it",
    "generate": "continue a prompt with the model of a run",
    "quantize": "quantise a trained model without training: RTN, GPTQ, MR-GPTQ",
    "export": "write a run for other programs: Hugging Face, compressed-tensors, GGUF",
    "recipes": "the recipes, a line each, and how number formats are named",
    "doctor": "what this machine has, and what each recipe runs on here",
}


def main() -> int:
    """Entry point of `qtrain`. Exit codes: 0 done, 2 a mistake in what was asked; train and sweep have more."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"qtrain {version('qtrain')}")
        return 0
    if name not in COMMANDS:
        near = [f"; did you mean {found!r}?" for found in difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)]
        told = f"unknown command {visible(name)!r}{''.join(near)}" if name else "name a command"
        print(f"error: {told}\n\n{usage()}", file=sys.stderr)
        return 2
    if name == "train":  # the processes of other devices are started by this very command
        sys.modules["__main__"].__spec__ = find_spec("qtrain.cli.train")
        sys.argv = [sys.argv[0], *rest]
    else:
        sys.argv = [f"qtrain {name}", *rest]
    return start(name)


def start(name: str) -> int:
    """Run a sub-command with the arguments in sys.argv, also from a script of that purpose -> its exit code."""
    try:
        status = import_module(f"qtrain.cli.{name}").main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"error: {explain_missing(error)}", file=sys.stderr)
    except BrokenPipeError:  # what read our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 2


def usage() -> str:
    lines = [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qtrain COMMAND ...",
            "",
            *lines,
            "",
            "`qtrain COMMAND --help` explains each; `qtrain --version` is this one's.",
        ]
    )


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of a sub-command. description: what the module says of it, with examples."""
    text = as_called(name, description)
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def as_called(name: str, text: str | None) -> str:
    """A text in which the command is written as it was called now: by its script, or by `qtrain`."""
    return (text or "").replace(f"qtrain {name} ", f"{shlex.join(_called())} ")


def this_command() -> str:
    """The command that runs, as one would type it again."""
    return shlex.join([*_called(), *sys.argv[1:]])


def _called() -> list[str]:
    first = sys.argv[0]
    return ["python", first] if Path(first).suffix == ".py" else first.split()
