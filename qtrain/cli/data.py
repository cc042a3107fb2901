"""Prepare a corpus ahead of time: tokenise it once into the cache that training reads.

    qtrain data data=c4 tokenizer=bpe data.max_tokens=1_000_000_000
    qtrain data data=text data.files='corpus/*.txt' tokenizer.vocab_size=8192 tokenizer=bpe
    qtrain data data=stdlib verify=true

Every key of the groups `data`, `validation` and `tokenizer` can be set. What is there already is opened, not made
again. verify=true then reads every file and compares its checksum with the manifest.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qtrain.cli import as_called
from qtrain.config.settings import group_names
from qtrain.errors import UserError

if TYPE_CHECKING:
    from qtrain.data.corpus import Corpus


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(as_called("data", __doc__))
        print(f"data: {', '.join(group_names('data'))}\ntokenizer: {', '.join(group_names('tokenizer'))}")
        return
    from qtrain.data.prepare import prepare, prepare_validation
    from qtrain.plan import budget_tokens
    from qtrain.train import compose

    checked = _asks_to_verify(arguments)
    config = compose([argument for argument in arguments if not argument.startswith("verify=")])
    corpus = prepare(config.data, config.tokenizer, budget_tokens=budget_tokens(config))
    further = prepare_validation(config.validation, config.data, config.tokenizer, corpus)
    shown = {f"{part.place}, weight {part.weight}:" if part.name else "": part.corpus for part in corpus.parts}
    shown |= {f"validation.{name}:": each for name, each in further.items()}
    if checked:
        for each in shown.values():
            each.verify()
    for heading, each in shown.items():
        if heading:
            print(heading)
        _show(each, checked)


def _asks_to_verify(arguments: list[str]) -> bool:
    said = [argument for argument in arguments if argument.startswith("verify=")]
    if not {*said} <= {"verify=true", "verify=false"}:
        raise UserError(f"{said[0]}: give verify=true, or leave it out")
    return said[-1:] == ["verify=true"]


def _show(corpus: Corpus, checked: bool) -> None:
    from qtrain.data.prepare import describe_cut

    for name, split in (("train", corpus.train), ("val", corpus.val)):
        if split.n_tokens == 0:  # of what is validated on alone
            continue
        size = f"{split.n_bytes / 1e6:,.1f} MB"
        print(f"{name:<6} {split.n_tokens:>15,} tokens {split.n_documents:>12,} documents {size:>14}")
    if corpus.is_cut:
        print(describe_cut(corpus))
    print(f"vocabulary {corpus.vocab_size:,}, {corpus.bytes_per_token:.3f} bytes per token in validation")
    print(f"bigram cross-entropy {corpus.bigram_cross_entropy:.4f} nats per token")
    if dropped := corpus.manifest.get("dropped_from_train"):
        print(f"dropped from train, being in validation too: {dropped:,} documents")
    print(f"data_hash {corpus.data_hash[:16]}\nfolder {corpus.folder}{' (checksums verified)' if checked else ''}")
