"""What every export starts from: the run, and the weights of its quantised layers as codes and scales.

The codes are those of the forward: of the QTensor that the layer multiplies, made by the layer's own quantiser from the
checkpoint's weights. No export quantises on its own.
"""

# N out features, K in features

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from qtrain.config import Config
from qtrain.data.tokenizer import Tokenizer
from qtrain.errors import UserError, first_line
from qtrain.models.base import Transformer
from qtrain.models.decoder import Decoder
from qtrain.plan import computes_in_high_precision, make_plan
from qtrain.quant import PackedLinear, QuantLinear
from qtrain.quant.adapter import reserve_beside, whole_weight
from qtrain.quant.functional import Call, Numerics, given_scale
from qtrain.quant.linear import quant_linears
from qtrain.quant.packed import layout_of, unsettled
from qtrain.quant.quantizer import QuantizedTensor
from qtrain.quant.random import key_table
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import sync_folder
from qtrain.training.build import build_model, load_run, load_tokenizer
from qtrain.training.checkpoint import holds_codes, newest, shapes, values_of, weight, whole_number
from qtrain.training.tune import merged
from qtrain_kernels.formats import ELEMENTS, Element
from qtrain_kernels.qtensor import Layout, QTensor
from qtrain_kernels.reference import constant_scale

T = TypeVar("T")
MARKERS = ("outliers.columns", "adapter.A")  # tensors that a layer has where parts stay in 16 bits beside its codes


class Refused(ValueError):  # noqa: N818  a reason, of which `export` makes a UserError
    """Why a format cannot hold what a recipe trains."""


@dataclass(frozen=True)
class Exported:
    """step: of the checkpoint. recipe: of the run; None where it quantised nothing. parameters: that are stored.
    weight_bytes: of all weights. bits_per_weight: what the file spends on a weight of the quantised layers, scales
    included. kinds: format -> how many layers are in it. notes: what a reader does otherwise than the training."""

    folder: Path
    step: int
    parameters: int
    weight_bytes: int
    recipe: str | None
    bits_per_weight: float = 16.0
    kinds: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedRun:
    """The newest good checkpoint of a run. folder: of the checkpoint; sizes: of the tensors that other programs have a
    name for, by their names in a qtrain state dict. is_packed: whether the checkpoint holds codes, not weights. merged:
    the weights of a run that tuned, with its adapters."""

    path: Path
    config: Config
    model: Transformer
    step: int
    folder: Path
    vocab_size: int
    tokenizer: Tokenizer
    sizes: dict[str, torch.Size]
    is_packed: bool
    merged: Mapping[str, Tensor] | None = None

    def weight(self, name: str) -> Tensor:
        """Of codes, what they stand for, out of their rotation."""
        if self.merged is not None:
            return self.merged[name]
        layer = self.layers.get(name.removesuffix(".weight")) if self.is_packed else None
        if layer is None:
            return weight(self.folder, name)
        packed = PackedLinear(self._stored(layer), None, layer.numerics, layer.name, _keys(layer))
        reserve_beside(packed, self._shapes)
        beside = [part for part in packed.state_dict() if part.startswith(("outliers.", "adapter."))]
        packed.load_state_dict({part: weight(self.folder, f"{layer.name}.{part}") for part in beside}, strict=False)
        return whole_weight(packed)

    def _stored(self, layer: QuantLinear) -> QTensor:
        """Of a checkpoint that holds codes."""
        layout = layout_of(layer.numerics, (layer.out_features, layer.in_features))
        return QTensor.of(layout, [weight(self.folder, f"{layer.name}.{name}") for name in layout.names])

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return shapes(self.folder)

    @cached_property
    def with_more(self) -> frozenset[str]:
        """Names of the layers of a packed checkpoint of which parts stay in 16 bits beside their codes: outliers, or
        the low-rank part of their error."""
        return frozenset(name for name in self.layers if any(f"{name}.{part}" in self._shapes for part in MARKERS))

    @property
    def recipe(self) -> str | None:
        """None for one that quantises nothing."""
        return self.config.recipe.name if self.config.recipe.operands() else None

    @property
    def parameters(self) -> int:
        return sum(size.numel() for size in self.sizes.values())

    @cached_property
    def layers(self) -> dict[str, QuantLinear]:
        """The quantised layers by name, without their weights. UserError where the last steps ran without quantisers,
        and where a quantised lm_head shares its weight with the embedding."""
        if self.recipe is None:
            return {}
        if self.merged is not None:
            raise UserError(
                f"{self.path}: what it tuned is merged into its base, which has no codes any more; export "
                "it as a Hugging Face checkpoint (--to hf), or the adapter alone (--to peft)"
            )
        with torch.device("meta"):
            found = {layer.name: layer for layer in quant_linears(build_model(self.config, self.vocab_size))}
        plan = make_plan(self.config, vocab_size=self.vocab_size)
        if computes_in_high_precision(self.config, plan, self.step - 1):
            raise UserError(
                f"{self.path}: its last steps computed without quantisers (recipe.high_precision_after), so there are "
                "no trained codes; export it as a Hugging Face checkpoint"
            )
        if self.model.tie_embeddings and "lm_head" in found:
            raise UserError(
                f"{self.path}: lm_head is quantised and shares its weight with the embedding, which is not; no format "
                "stores both; export it as a Hugging Face checkpoint"
            )
        return found

    def held_by(self, format: str, choose: Callable[[QuantLinear], T]) -> dict[str, T]:
        """What `choose` says of each quantised layer, by its name. UserError where it refuses one."""
        chosen: dict[str, T] = {}
        for name, layer in self.layers.items():
            try:
                if name in self.with_more:
                    raise Refused("parts of its weight stay in 16 bits beside the codes, which no format here stores")
                chosen[name] = choose(layer)
            except Refused as reason:
                raise UserError(
                    f"{self.path}: {format} cannot hold {name} as recipe {self.config.recipe.name} trains it: "
                    f"{reason}; export it as a Hugging Face checkpoint, which quantises nothing"
                ) from None
        return chosen

    def codes(self, layer: QuantLinear) -> Codes:
        """Of one layer, from the checkpoint. UserError where the weight is not finite."""
        if self.is_packed:
            found = _codes(layer, self._stored(layer).to(_beside_block_scales(layer), layer.numerics.backend))
        else:
            scale = None if layer.weight_scale is None else weight(self.folder, f"{layer.name}.weight_scale")
            found = codes_of(layer, weight(self.folder, f"{layer.name}.weight"), scale)
        if not all(
            part.isfinite().all() for part in (found.codes, found.block_scale, found.line_scale) if part is not None
        ):
            raise UserError(
                f"{self.folder}: {layer.name} holds values that are not finite; export an earlier checkpoint"
            )
        return found


def open_run(run: Path) -> TrainedRun:
    """UserError when the run has no checkpoint, or its model no class in transformers."""
    directory = RunDirectory(run)
    config = directory.read_config()
    if not isinstance(config.model, Transformer):
        raise UserError(f"{run}: transformers has no class for models of family {config.model.choice()}")
    found = newest(directory.checkpoints)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    step, folder = found
    vocab_size = whole_number(folder, values_of(folder), "vocab_size")
    with torch.device("meta"):  # one that holds codes has no weights to ask for their shapes
        sizes = {name: value.shape for name, value in Decoder(config.model, vocab_size).named_parameters()}
    tokenizer, is_packed = load_tokenizer(run), holds_codes(folder)
    whole = None
    if config.tune is not None and config.tune.freezes:
        tuned = load_run(run, step)
        assert isinstance(tuned, Decoder)
        whole = merged(tuned)
    return TrainedRun(run, config, config.model, step, folder, vocab_size, tokenizer, sizes, is_packed, whole)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes its name when it is whole. UserError when the name is taken or cannot be written."""
    if out.exists():
        raise UserError(f"{out} exists; give a new folder")
    partial = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- codes of a layer


@dataclass(frozen=True)
class Codes:
    """A weight as its forward multiplies it, after the rotation of its rows: codes * block_scale * line_scale.

    codes: (N, K) float32, on the grid of the layout's element, less the zero point where there is one. block_scale:
    float32, one for each tile, (N / rows, K / size) rounded up; None without blocks. line_scale: float32, () or one for
    each row, (N, 1); None where it is 1. zero_point: uint8, one for each block, (N, K / size); None where the element
    has none.
    """

    codes: Tensor
    block_scale: Tensor | None
    line_scale: Tensor | None
    layout: Layout
    zero_point: Tensor | None = None

    def row_scales(self) -> Tensor | None:
        """The block scales with one for each row, (N, K / size)."""
        if self.block_scale is None:
            return None
        return self.block_scale.repeat_interleave(self.layout.rows, 0)[: self.layout.shape[0]]

    def integers(self) -> Tensor:
        """(N, K) int8: the codes in units of `integer_grid`; where there are zero points, the levels of b bits less
        2^(b - 1)."""
        assert self.layout.plan is not None
        unit, _ = integer_grid(self.layout.plan.element)
        if self.zero_point is None:
            return (self.codes / unit).to(torch.int8)
        above = self.signed_zero_points().repeat_interleave(self.layout.size or 1, 1)
        return (self.codes + above).to(torch.int8)

    def signed_zero_points(self) -> Tensor:
        """(N, K / size) int8: the zero points of b bits less 2^(b - 1)."""
        assert self.layout.plan is not None and self.zero_point is not None
        return (self.zero_point.int() - 2 ** (self.layout.plan.element.bits - 1)).to(torch.int8)


def codes_of(layer: QuantLinear, weight: Tensor, scale: Tensor | None = None) -> Codes:
    """The operand fprop.w of a layer. weight (N, K) master; scale: a learned one. The layer's own weight is not
    read. Refused where the forward has no codes that stay."""
    reason = unsettled(layer.numerics)
    if reason is not None:
        raise Refused(reason)
    call = Call(layer.numerics, _keys(layer), torch.float32, None)
    rotation, layout = call.rotation("fprop", weight.shape[1]), _beside_block_scales(layer)
    return _codes(layer, call.operand("fprop.w", weight, rotation, learned=given_scale(scale), layout=layout)[0])


def _keys(layer: QuantLinear) -> Tensor:
    return key_table([layer.keyed_by], 0, 0)[0]


def _beside_block_scales(layer: QuantLinear) -> Layout:
    return layer.numerics.fprop.right.layout((layer.out_features, layer.in_features), blocks=True).unmasked


def _codes(layer: QuantLinear, operand: QTensor) -> Codes:
    line = operand.tensor_scale
    if line is None and operand.layout.constant != 1.0:
        line = torch.tensor(operand.layout.constant)
    codes = QuantizedTensor.of(operand, layer.numerics.backend).codes
    return Codes(codes, operand.block_scale, line, operand.layout, operand.zero_point)


def has_line_scale(numerics: Numerics) -> bool:
    """Whether a scale lies above those of the blocks, or beside the codes where there are no blocks."""
    plan = numerics.fprop.right.plan
    assert plan is not None
    return plan.line_rule is not None or constant_scale(plan) != 1.0


def integer_grid(element: Element) -> tuple[float, int]:
    """(unit, bits): all codes are whole multiples of unit, which fit into so many bits of two's complement. A grid
    without zero needs one bit more than its codes: k + 1/2 is 2k + 1 halves. Levels beside a zero point are whole
    already, and take their own bits."""
    if element.zero_point:
        return element.step, element.bits
    unit = min(abs(code) for code in element.levels() if code)
    return unit, int(element.max / unit).bit_length() + 1


def e2m1_bits(codes: Tensor) -> Tensor:
    """Codes of E2M1 as uint8: sign, exponent and mantissa in the low four bits."""
    magnitudes = torch.tensor(ELEMENTS["e2m1"].magnitudes())
    return (torch.searchsorted(magnitudes, codes.abs()) + 8 * codes.signbit()).to(torch.uint8)


def e8m0_bits(scales: Tensor) -> Tensor:
    """Powers of two as uint8, 127 for 1."""
    return (torch.frexp(scales).exponent + 126).to(torch.uint8)
