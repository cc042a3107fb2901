"""A model in lm-evaluation-harness, by its own `LM` interface.

    from qtrain.integrations.lm_eval import QtrainLM, run_tasks

    run_tasks(QtrainLM(qtrain.evaluate.target.load("runs/quest-1a2b3c4d")), ["tasks/mine.yaml"])

Needs the extra eval.
"""

# B requests, T tokens, V vocabulary

# The extra eval is installed by itself, where nobody checks types.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from qtrain.errors import UserError
from qtrain.evaluate.target import Target
from qtrain.models.decoder import Decoder
from qtrain.models.generate import generate
from qtrain.quant import sees_tokens_apart

Pair = tuple[Any, list[int], list[int]]  # a request, its context and its continuation in tokens
MAX_NEW_TOKENS = 256  # where a task does not say; lm-eval's own
UNDERSTOOD = ("until", "max_gen_toks", "do_sample", "temperature", "top_k")  # of a task's generation_kwargs
OF_DRAWING = ("top_p", "min_p", "typical_p")  # which change nothing of the likeliest token


class QtrainLM(TemplateLM):
    """The log-likelihoods of a target's model, and what it continues greedily or drawn with a seed.

    Texts are encoded without a token before them. Where none comes before a text, its first token follows the one that
    ends a document, as in training. Inputs that are longer than the target's seq_len lose their beginning.
    """

    def __init__(self, target: Target, batch: int = 8) -> None:
        """batch: sequences at once, filled up at their ends; 1 where the recipe has a scale for all tokens of a batch,
        which such tokens would change."""
        super().__init__()
        self.target = target
        self.batch = batch if sees_tokens_apart(target.model) else 1
        self._device = target.device

    @property
    def eot_token_id(self) -> int:
        return self.target.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.target.tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.target.tokenizer.encode(string).tolist()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [[*self._windows(request.args[0])] for request in requests]
        found = iter(self._loglikelihood_tokens([(None, *window) for each in windows for window in each]))
        totals = [sum(next(found)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.target.seq_len, 1)
        return map(make_disjoint_window, rolling)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each continuation: its log-likelihood, and whether each of its tokens is the likeliest."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            pairs = [requests[i] for i in chosen]
            for i, pair, scores in zip(chosen, pairs, self._scores(pairs), strict=True):
                found[i] = _score(scores, pair[2])
                if pair[0] is not None:
                    self.cache_hook.add_partial("loglikelihood", pair[0], found[i])
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _scores(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Of each: log-probabilities of the tokens of its continuation, (length, V) float32."""
        longest = self.target.seq_len
        for _, _, continuation in pairs:
            if len(continuation) > longest:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens exceeds the {longest} that {self.target.name} "
                    "reads at once"
                )
        inputs = [[*context, *continuation][-longest - 1 :][:-1] for _, context, continuation in pairs]
        tokens = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
        for row, ids in zip(tokens, inputs, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        device = self.target.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.target.precision == "bf16-mixed"):
            logits = self.target.model(tokens.to(device)).float().log_softmax(-1)
        ends = [(len(ids) - len(pair[2]), len(ids)) for ids, pair in zip(inputs, pairs, strict=True)]
        return [each[start:end] for each, (start, end) in zip(logits, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A request that is repeated draws with the seeds 0, 1, 2, ..."""
        repeats: Counter[str] = Counter()
        found = []
        for request in requests:
            context, options = request.args
            found.append(self._continued(context, options, repeats[context]))
            repeats[context] += 1
        return found

    def _continued(self, context: str, options: dict[str, Any], seed: int) -> str:
        """The text after a context, up to a stop sequence, the end of the document, or so many tokens."""
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        temperature = asked.get("temperature", 0.0)
        unused = OF_DRAWING if temperature == 0 else ()
        for name in asked.keys() - {*UNDERSTOOD, *unused}:
            if asked[name] in (None, False, 1):  # which ask for nothing
                continue
            raise UserError(
                f"generation_kwargs of the task have {name}={asked[name]!r}, and a target here knows "
                f"{', '.join(UNDERSTOOD)}; remove it from the task"
            )
        tokenizer, model = self.target.tokenizer, self.target.model
        if not isinstance(model, Decoder):
            raise UserError(f"{self.target.name} is computed by transformers: evaluate it by lm-eval's own --model hf")
        n_tokens, until = asked["max_gen_toks"], handle_stop_sequences(asked["until"], None)
        if n_tokens >= self.target.seq_len:
            raise UserError(
                f"the task asks for {n_tokens} new tokens, and {self.target.name} reads {self.target.seq_len} at once; "
                "set generation_kwargs.max_gen_toks of the task"
            )
        ids = self.tok_encode(context)[-(self.target.seq_len - n_tokens) :] or [self.prefix_token_id]
        found: list[int] = []
        text = ""
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.target.precision == "bf16-mixed"):
            for token in generate(model, ids, n_tokens, temperature=temperature, top_k=asked.get("top_k") or None,
                                  seed=seed, cached=sees_tokens_apart(model)):  # fmt: skip
                if token == self.eot_token_id:
                    break
                found.append(token)
                text = tokenizer.decode(found)
                if any(stop in text for stop in until):
                    break
        text = postprocess_generated_text(text, until, None)
        self.cache_hook.add_partial("generate_until", (context, options), text)
        return text


def _score(scores: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    ids = torch.tensor(continuation, device=scores.device)
    return float(scores.gather(-1, ids[:, None]).sum()), bool((scores.argmax(-1) == ids).all())


def read_tasks(files: Sequence[str | Path]) -> None:
    """UserError for a task file that lm-eval does not read, or whose data it does not find."""
    _quiet()
    with _explained(files):
        TaskManager(include_defaults=False).load(_paths(files))


def run_tasks(model: TemplateLM, files: Sequence[str | Path], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """The results of local task files (lm-eval's YAML): task -> metric -> value. limit: documents of each.

    Paths in a task file (dataset_kwargs.data_files) are read from the working directory, as lm-eval reads them.
    UserError for a file that lm-eval does not read.
    """
    _quiet()
    with _explained(files):
        found = simple_evaluate(
            model,
            tasks=_paths(files),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    assert found is not None  # of rank 0
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, int | float)}
        for name, values in found.get("results", {}).items()
    }


def _paths(files: Sequence[str | Path]) -> list[Any]:
    return [str(Path(file).resolve()) for file in files]


def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default


@contextmanager
def _explained(files: Sequence[str | Path]) -> Iterator[None]:
    """What lm-eval raises about its task files, as a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError, yaml.YAMLError, jinja2.TemplateError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())  # of YAML on several lines, the last of which says where
        raise UserError(f"lm-eval cannot run {', '.join(map(str, files))}: {type(error).__name__}: {said}") from error
