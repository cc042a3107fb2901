import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qtrain.metrics import bits_per_byte, flops_per_token
from qtrain.models.decoder import Decoder, matmul_parameters
from qtrain.models.families.llama import Llama

VOCABULARY = 40


def config(**changes: Any) -> Llama:
    base = {"name": "tiny", "dim": 128, "n_layers": 3, "n_heads": 4, "ffn_dim": 192, "seq_len": 64}
    return Llama.model_validate(base | changes)


def loss_of(model: Decoder, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


def tokens(sequences: int, settings: Llama) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, settings.seq_len + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"tie_embeddings": True}, {"seq_len": 16, "n_layers": 1}])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """In the math backend attention is plain matrix products, which the counter knows on every device."""
    settings = config(**changes)
    model = Decoder(settings, VOCABULARY)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = loss_of(model, tokens(2, settings))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    expected = flops_per_token(settings, VOCABULARY) * 2 * settings.seq_len
    assert forward.get_total_flops() * 3 == expected
    assert backward.get_total_flops() * 3 == expected * 2


def test_flops_of_the_30m_model_by_hand() -> None:
    paper = config(dim=640, n_layers=6, n_heads=5, ffn_dim=1792, seq_len=512)
    matmul = 6 * (4 * 640 * 640 + 3 * 640 * 1792) + 32000 * 640
    assert matmul_parameters(paper, 32000) == matmul
    assert flops_per_token(paper, 32000) == 6 * matmul + 12 * 6 * 512 * 640


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(2), 50, 200) == pytest.approx(0.5)  # a token of 2 bits spells four bytes
    with pytest.raises(ValueError, match="found 0 bytes for 3 tokens"):
        bits_per_byte(1.0, 3, 0)
