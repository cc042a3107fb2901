"""The loss of a model on text: nats per token, perplexity, bits per byte, and how sure they are."""

# B sequences, T tokens

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from qtrain.config import Config
from qtrain.data.base import DataSettings
from qtrain.data.batches import ValidationSet, validation_set
from qtrain.data.corpus import Corpus, check_vocab
from qtrain.data.prepare import prepare, prepare_text, prepare_validation
from qtrain.errors import UserError
from qtrain.evaluate.target import Target
from qtrain.metrics import bits_per_byte
from qtrain.models.decoder import Decoder
from qtrain.plan import budget_tokens
from qtrain.training.losses import UNCOUNTED, documents_in, inputs_and_targets

BATCH = 8  # sequences at once, of a target that is of no run


@dataclass(frozen=True)
class Loss:
    """On one text. loss: mean cross-entropy in nats per token. standard_error: of this mean, over sequences; NaN of a
    single one. tokens: that were predicted and count; bytes: of UTF-8 that they spell, by the mean of the text."""

    loss: float
    standard_error: float
    sequences: int
    tokens: int
    bytes: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.loss, self.tokens, self.bytes)


def losses(
    target: Target,
    data: DataSettings | None = None,
    *,
    like: Config | None = None,
    batch: int | None = None,
    context: int | None = None,
) -> dict[str, Loss]:
    """The loss of a model on each part of a text, by name; "" is all of it: of a mixture the parts by their weights.

    data: settings of a source, of which the validation split that it names is read, else all of it; at most
    data.val_tokens, spread over its length. None: what a run is validated on, that of `like`, else the target's own;
    its further sources (config.validation) are parts that do not count in "".
    Tokens attend to their own document alone where the settings of the text say so (data.document_mask), or the target
    was trained so.
    batch: sequences at once, None as the run has them: under a recipe with one scale for all tokens of a batch, the
    loss depends on them. context: tokens of a sequence; None is that of `like`, else the target's seq_len.

    A run's own validation has the same windows in the same batches. UserError for a text that is empty or too short,
    and for a target that cannot tell documents apart.
    """
    own = like or target.config
    length = context or (like.model.seq_len if like else target.seq_len)
    if length > target.seq_len:
        raise UserError(f"{target.name} reads at most {target.seq_len} tokens at once; {length} were asked for")
    further: dict[str, Corpus] = {}
    if data is not None:
        corpus = prepare_text(data, target.tokenizer_config, progress=False)
    elif own is not None:
        tokenizer = own.tokenizer if own is target.config else target.tokenizer_config
        corpus = prepare(own.data, tokenizer, budget_tokens=budget_tokens(own), progress=False)
        further = prepare_validation(own.validation, own.data, tokenizer, corpus, progress=False)
    else:
        raise UserError(
            f"{target.name} is of no run, so name the text: data=text data.files='notes/*.txt', or --like RUN"
        )
    check_vocab(corpus, target.vocab_size)
    if corpus.tokenizer.hash != target.tokenizer.hash:
        raise UserError(
            f"the text that {target.name} was trained on has changed, and a tokenizer of it would be another one now; "
            "name the text by data=..., which is read with the tokenizer that the run kept"
        )
    size = batch or (own.trainer.micro_batch_size if own else BATCH)
    windows = partial(validation_set, seq_len=length, micro_batch_size=size)
    weights = sum(part.weight for part in corpus.parts)
    sets = {part.name: windows(part.place, part.corpus, share=part.weight / weights) for part in corpus.parts}
    sets |= {name: windows(f"validation.{name}", each) for name, each in further.items()}
    end = _end_of_document(target, data or (own and own.data))
    found = {name: _loss(target, each, end) for name, each in sets.items()}
    return found if "" in found else {"": _mixed(found, sets), **found}


def _end_of_document(target: Target, data: DataSettings | None) -> int | None:
    """The token after which another document begins, where tokens attend to their own alone; None where they do not.
    UserError for a target that cannot compute that."""
    if not any(each is not None and each.document_mask for each in (data, target.config and target.config.data)):
        return None
    theirs = not isinstance(target.model, Decoder)
    if theirs or (target.device.type == "cuda" and target.precision == "32-true"):
        who = "transformers computes this model" if theirs else "on CUDA that attention has no float32, which it takes"
        raise UserError(
            f"data.document_mask=true lets no token of {target.name} see another document, and {who}; evaluate the "
            "run that it was exported from, or name the text by data=... without data.document_mask"
        )
    return target.tokenizer.eos_id


@torch.no_grad()
def _loss(target: Target, text: ValidationSet, end_of_document: int | None) -> Loss:
    sums: list[float] = []
    tokens: list[int] = []
    with torch.autocast(target.device.type, torch.bfloat16, enabled=target.precision == "bf16-mixed"):
        for batch in text.batches():
            inputs, targets = inputs_and_targets(batch.to(target.device))
            logits = target.model(inputs, **documents_in(inputs, end_of_document))
            each = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=UNCOUNTED, reduction="none"
            )
            sums += each.view(targets.shape).sum(1, dtype=torch.float64).tolist()
            tokens += (targets != UNCOUNTED).sum(1).tolist()
    total = sum(tokens)
    if not total:
        raise UserError(f"no loss counts any token of the text that {target.name} is evaluated on; give more of it")
    return Loss(*_mean(sums, tokens), len(sums), total, total * text.bytes_per_token)


def _mean(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """The mean of all tokens, and its standard error over sequences, of which some may count fewer tokens: that of a
    ratio of two sums (Cochran, Sampling Techniques, 6.4)."""
    count, total = len(sums), sum(tokens)
    mean = math.fsum(sums) / total
    if count < 2:
        return mean, math.nan
    spread = math.fsum((each - mean * size) ** 2 for each, size in zip(sums, tokens, strict=True)) / (count - 1)
    return mean, math.sqrt(spread * count) / total


def _mixed(found: Mapping[str, Loss], sets: Mapping[str, ValidationSet]) -> Loss:
    """By the weights of a mixture, as a run validates on one."""
    shares = {name: each.share for name, each in sets.items() if each.share}
    found = {name: found[name] for name in shares}
    loss = sum(shares[name] * each.loss for name, each in found.items())
    error = math.sqrt(sum((shares[name] * each.standard_error) ** 2 for name, each in found.items()))
    tokens = sum(each.tokens for each in found.values())
    per_token = sum(shares[name] * sets[name].bytes_per_token for name in found)
    return Loss(loss, error, sum(each.sequences for each in found.values()), tokens, tokens * per_token)
