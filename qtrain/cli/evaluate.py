"""How good a trained model is: its loss on a text, or its scores on tasks of lm-evaluation-harness.

qtrain evaluate runs/quest-1a2b3c4d
qtrain evaluate runs/quest-1a2b3c4d data=text data.files='books/*.txt'
qtrain evaluate quest-packed --like runs/quest-1a2b3c4d
qtrain evaluate runs/quest-1a2b3c4d --tasks tasks/mine.yaml

TARGET is a run directory (its newest good checkpoint), one of its checkpoints/step-*, or a Hugging Face checkpoint: a
folder, also one that `qtrain export` wrote, or a name on the hub; or a folder with the model.gguf of `--to gguf`, of
which the weights are computed with in float32. Without data=, the text is what the run is validated
on, in the same batches, its further sources each for itself. Every key of the group `data` can be set;
data.val_tokens says how much is read.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli import command_parser
from qtrain.errors import UserError

if TYPE_CHECKING:
    from qtrain.data.base import DataSettings
    from qtrain.evaluate.perplexity import Loss
    from qtrain.evaluate.target import Target


def main() -> None:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a run, a checkpoint, a Hugging Face folder or name, or one with model.gguf",
    )
    parser.add_argument("settings", nargs="*", metavar="data.KEY=VALUE", help="the text")
    parser.add_argument("--like", type=Path, metavar="RUN", help="the text that this run is validated on")
    parser.add_argument("--context", type=_count, metavar="N", help="tokens of a sequence (default: the model's)")
    parser.add_argument("--batch", type=_count, metavar="N", help="sequences at once (default: the run's, else 8)")
    parser.add_argument("--tasks", type=Path, nargs="+", metavar="FILE", help="task files of lm-evaluation-harness")
    parser.add_argument("--limit", type=_count, metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args()
    if arguments.tasks:
        found = _on_tasks(arguments)
    else:
        found = _on_text(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def _on_text(arguments: argparse.Namespace) -> dict[str, Any]:
    from qtrain.evaluate.perplexity import losses
    from qtrain.evaluate.target import load
    from qtrain.runs.directory import RunDirectory

    data = _data(arguments.settings)
    if data is not None and arguments.like is not None:
        raise UserError("--like and data= both name the text; give one of them")
    like = None if arguments.like is None else RunDirectory(arguments.like).read_config()
    target = load(arguments.target)
    found = losses(target, data, like=like, batch=arguments.batch, context=arguments.context)
    if not arguments.json:
        _show(target, found)
    return {name or "all": _plain(loss) for name, loss in found.items()}


def _data(settings: list[str]) -> DataSettings | None:
    if not settings:
        return None
    from qtrain.train import compose

    for setting in settings:
        if setting.partition("=")[0].lstrip("+").partition(".")[0] != "data":
            raise UserError(f"{setting}: evaluate takes settings of data alone, such as data=text data.files='*.txt'")
    return compose(settings).data


def _plain(loss: Loss) -> dict[str, float]:
    error = None if math.isnan(loss.standard_error) else loss.standard_error
    return {
        "loss": loss.loss,
        "standard_error": error,  # pyright: ignore[reportReturnType]  JSON's null
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "sequences": loss.sequences,
        "tokens": loss.tokens,
        "bytes": round(loss.bytes),
    }


def _show(target: Target, found: dict[str, Loss]) -> None:
    print(target.name + ("" if target.step is None else f", step {target.step}"))
    for name, loss in found.items():
        error = "" if math.isnan(loss.standard_error) else f" ± {loss.standard_error:.4f}"
        print(
            f"{name and name + ': '}{loss.loss:.4f}{error} nats per token, perplexity {loss.perplexity:.4g}, "
            f"{loss.bits_per_byte:.4f} bits per byte; {loss.tokens:,} tokens in {loss.sequences:,} sequences, "
            f"about {loss.bytes:,.0f} bytes"
        )


def _on_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.settings or arguments.like or arguments.context:
        raise UserError("a task file names its own text: leave out data=, --like and --context")
    from qtrain.evaluate.target import load
    from qtrain.evaluate.tasks import check_task_files

    check_task_files(arguments.tasks, "--tasks")
    from qtrain.integrations.lm_eval import QtrainLM, run_tasks

    model = QtrainLM(load(arguments.target), arguments.batch or 8)
    found = run_tasks(model, arguments.tasks, arguments.limit)
    if not arguments.json:
        for task, values in found.items():
            for metric, value in values.items():
                print(f"{task:<24} {metric:<28} {value:.6g}")
    return found
