import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qtrain.metrics import bits_per_byte, estimate_memory, flops_per_token
from qtrain.models.decoder import Decoder, matmul_parameters
from qtrain.models.families.llama import Llama
from qtrain.optim.groups import build_optimizer
from qtrain.optim.optimizers.adamw import AdamW
from qtrain_kernels import precision

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


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_moments_are_exact(tied: bool) -> None:
    settings = config(tie_embeddings=tied)
    model = Decoder(settings, VOCABULARY)
    optimizer = build_optimizer(model, AdamW(name="adamw", lr=0.1))
    loss_of(model, tokens(1, settings)).backward()
    optimizer.step()
    memory = estimate_memory(settings, VOCABULARY, 1, mixed=True, state_bytes=AdamW.state_bytes)
    assert memory.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(
        parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    assert memory.total == memory.parameters + memory.gradients + memory.optimizer + memory.activations


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("changes", [{}, {"n_layers": 6, "n_kv_heads": 1}, {"ffn_dim": 512}])
def test_activations_are_about_what_autograd_keeps(
    mixed: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", True)  # without them, products keep float32 copies
    settings = config(**changes)
    model = Decoder(settings, VOCABULARY)
    kept: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False)  # as Lightning runs it
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        loss_of(model, tokens(8, settings))
    saved = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)
    assert estimate_memory(settings, VOCABULARY, 8, mixed=mixed, state_bytes=8).activations == pytest.approx(
        saved, rel=0.05
    )


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(2), 50, 200) == pytest.approx(0.5)  # a token of 2 bits spells four bytes
    with pytest.raises(ValueError, match="found 0 bytes for 3 tokens"):
        bits_per_byte(1.0, 3, 0)
