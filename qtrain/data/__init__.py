"""Text to batches: sources, tokenizers, prepared corpora and the order in which a run reads them.

Batches of a run are in `qtrain.data.batches`.
"""

from qtrain.data.corpus import Corpus, Split, check_vocab, open_corpus, verify
from qtrain.data.order import WindowOrder, describe_epochs, epochs, repetition_warning
from qtrain.data.prepare import prepare, same_text
from qtrain.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "Split",
    "Tokenizer",
    "WindowOrder",
    "check_vocab",
    "describe_epochs",
    "epochs",
    "open_corpus",
    "prepare",
    "repetition_warning",
    "same_text",
    "verify",
]
