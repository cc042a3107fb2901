"""A rank's shards of the initial weights, made without the whole model, are those of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from qtrain.train import compose
from qtrain.training.build import build_model, build_without_weights
from qtrain.training.initialize import DeferredWeights
from qtrain.training.parallel import shard

SHARDS = 3  # which divide neither the vocabulary nor the width
SMALL = ["model.dim=64", "model.ffn_dim=64", "model.n_layers=2", "model.n_heads=2", "model.seq_len=16"]


@contextmanager
def mesh_of(rank: int) -> Iterator[DeviceMesh]:
    """Of ranks that are not there: their collectives return at once."""
    distributed.init_process_group("fake", rank=rank, world_size=SHARDS, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (1, SHARDS), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("more", [["recipe=bf16"], ["recipe=lsq", "model.tie_embeddings=true"]])
def test_each_rank_makes_its_part_of_the_same_weights(more: list[str]) -> None:
    config = compose([*SMALL, *more])
    whole = build_model(config, 97)
    for rank in range(SHARDS):
        with mesh_of(rank) as mesh:
            model = build_without_weights(config, 97)
            assert all(x.is_meta for x in model.parameters() if x.ndim == 2)
            before = torch.get_rng_state()
            shard(model, mesh)
            assert torch.equal(torch.get_rng_state(), before)
            parts = dict(model.named_parameters())
            for name, parameter in whole.named_parameters():
                part, rows = parts[name], parameter.detach().chunk(SHARDS)
                assert isinstance(part, DTensor)
                wanted = rows[rank] if rank < len(rows) else parameter[:0]
                torch.testing.assert_close(part.to_local(), wanted, rtol=0, atol=0, equal_nan=True, msg=name)
            for name, table in model.named_buffers():
                assert torch.equal(table, whole.get_buffer(name)), name


def test_what_shards_cannot_repeat_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"mul_.*cannot be made shard by shard"), DeferredWeights(0):
        torch.empty(4, 4).mul_(2.0)
