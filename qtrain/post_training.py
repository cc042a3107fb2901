"""Post-training quantisation of a whole model, block by block, from text alone.

Each block sees inputs that have gone through the quantised blocks before it. Within a block, layers are taken in the
order in which they are called, those that read the same input together; the inputs of the later ones have gone through
the earlier ones, quantised. What comes out is a run directory whose layers are PackedLinear: `qtrain generate`,
`qtrain export` and `qtrain.load_run` read it as any other.
"""

# B sequences, T tokens, D model dim, K in features

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

from qtrain.config import Config, TokenizerConfig, config_hash
from qtrain.config.settings import nearest
from qtrain.data.batches import TokenBatches
from qtrain.data.counted import ids_of
from qtrain.data.prepare import prepare
from qtrain.data.tokenizer import Tokenizer, load_kept, load_pretrained, tokenizer_files
from qtrain.errors import UserError
from qtrain.models import hf
from qtrain.models.decoder import Decoder, count_parameters
from qtrain.plan import budget_tokens
from qtrain.quant import PackedLinear, QuantLinear, convert, quant_linears, set_high_precision
from qtrain.quant.adapter import compensate, reserve_beside, whole_bits, whole_weight
from qtrain.quant.functional import Call
from qtrain.quant.outliers import Outliers
from qtrain.quant.packed import layout_of, unsettled
from qtrain.quant.ptq import (
    Hessian,
    Method,
    Split,
    eliminated,
    in_all_minifloats,
    make_up,
    quantize_weight,
    relative_error,
    sensitive,
    with_formats,
)
from qtrain.quant.ptq.formats import exponent_bits
from qtrain.quant.ptq.transforms import (
    AFTER_NORM,
    awq_smoothing,
    divide_inputs,
    exponent_biases,
    rotate_residual,
    smoothing,
)
from qtrain.quant.quantizer import rotate
from qtrain.quant.random import key_table
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import read_json, write_atomically
from qtrain.runs.status import Status
from qtrain.train import compose
from qtrain.training import checkpoint
from qtrain.training.losses import documents_in, evaluate, validation_values
from qtrain_kernels.qtensor import QTensor

Smooth = float | Literal["awq", "exponents"]


@dataclass(frozen=True)
class Way:
    """How a model is quantised: what is done to each weight, and to the model before.

    rotate_residual: QuaRot's rotation of the residual stream. smooth: what inputs of the layers after a norm are
    divided by, to be folded into it: None | SmoothQuant's, with this exponent | "awq" | "exponents", LLM-FP4's powers
    of two. formats: whether each layer gets the formats, of as many bits as the recipe's, of least output error. split:
    what of each weight stays in 16 bits. low_rank: the rank of the part of its error that is kept beside it (LoRC), 0
    for none.
    """

    weight: Method = field(default_factory=Method)
    rotate_residual: bool = False
    smooth: Smooth | None = None
    formats: bool = False
    split: Split = field(default_factory=Split)
    low_rank: int = 0

    @property
    def reads_rows(self) -> bool:
        """Whether it looks at inputs themselves, beside their moments."""
        return self.formats or self.smooth == "exponents"


METHODS = {
    "rtn": Way(),
    "rtn_mse": Way(Method(search=100)),
    "gptq": Way(Method(compensation="gptq")),
    "mr_gptq": Way(Method(search=100, compensation="gptq", order="activation")),
    "quarot": Way(Method(search=100, compensation="gptq"), rotate_residual=True),
    "smoothquant": Way(smooth=0.5),
    "awq": Way(Method(search=100), smooth="awq"),
    "llm_fp4": Way(Method(search=100, norm=2.0, weighted=True), smooth="exponents", formats=True),
}
SEQUENCES = 8  # in one forward of a block
SAMPLES = 32  # sequences whose outputs choose formats and exponent biases, as in LLM-FP4
OF_A_RUN = ("recipe", "data", "backend", "gemm")  # settings that a run is quantised with; all others are its own
PARTIAL = "quantization"  # the folder of what is done, while the rest is not

Report = Callable[[str], None]


class Input(NamedTuple):
    """Of a block: x (B, T, D), and where documents begin, as `Decoder` takes it."""

    x: Tensor
    cu_seqlens: Tensor | None


Run = Callable[[Input], Tensor]  # a block


@dataclass(frozen=True)
class LayerError:
    """|(W - W') X|^2 / |W X|^2 of a layer over the calibration text, and what rounding to nearest by the recipe's own
    rule would have given. bits: of a weight, with its scales, outliers and low-rank part. x, w: the formats of inputs
    and weights."""

    layer: str
    error: float
    nearest: float
    bits: float
    x: str
    w: str


@dataclass(frozen=True)
class Quantised:
    """val_loss in nats per token of the text that the settings name: of the model as it was, and as it is.
    bits_per_weight: of all layers, with all that lies beside the codes."""

    path: Path
    layers: tuple[LayerError, ...]
    val_loss_before: float
    val_loss: float
    bits_per_weight: float


@dataclass(frozen=True)
class Source:
    """A trained model in float32, without a recipe. config: its settings with the recipe and text that were asked
    for; tokenizer_config: by which that text is read with the model's tokenizer."""

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig
    step: int
    values: dict[str, Any]


def quantize(
    source: str, out: Path, settings: Sequence[str], method: str = "gptq", tokens: int = 131_072,
    say: Report = lambda _: None, split: Split | None = None, low_rank: int = 0,
) -> Quantised:  # fmt: skip
    """Quantise a run directory or a Hugging Face checkpoint into the new run directory `out`.

    settings: as of `qtrain train`: recipe=..., and data=... for another text than the run's own; of a run, those of
    OF_A_RUN alone. method: of METHODS.
    tokens: of the training split, that layers are calibrated on. say: is told each layer's error, and where mr_gptq
    has a recipe that does not rotate. split: what of each weight stays in 16 bits beside its codes; by default nothing.
    low_rank: the rank of the part of each weight's error that is kept beside its codes, in 16 bits.
    Started again after a stop, it goes on with the next block and ends with the same bits. UserError for an unknown
    method or a setting that a run has itself, a recipe whose weights have no codes that stay, text that is too short,
    and where `out` holds anything else.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}{nearest(method, [*METHODS])}; methods: {', '.join(METHODS)}")
    split = split or Split()
    if split.columns < 0 or any(bound is not None and not 0 < bound < inf for bound in (split.above, split.weights)):
        raise UserError(
            f"outliers need columns of at least 0 and finite bounds above 0; found columns={split.columns}, "
            f"above={split.above}, weights={split.weights}; leave out what is not wanted"
        )
    if low_rank < 0:
        raise UserError(f"the rank of what is kept of errors is at least 0; found {low_rank}; give 0 for none")
    way = replace(METHODS[method], split=split, low_rank=low_rank)
    opened = open_source(source, settings)
    beside = f"{split}-rank{low_rank}" if low_rank else f"{split}"
    name = f"{opened.config.name}-{method}{beside}-{opened.config.recipe.name}"
    config = opened.config.model_copy(update={"name": name})
    directory = RunDirectory(out)
    task = {"source": str(Path(source).resolve()), "step": opened.step, "method": asdict(way)}
    task |= {"tokens": tokens, "settings": sorted(settings)}
    _check(directory, task)
    corpus = prepare(config.data, opened.tokenizer_config, budget_tokens=budget_tokens(config))
    if corpus.tokenizer.hash != opened.tokenizer.hash:
        raise UserError(
            f"the text that {source} was trained on has changed, and a tokenizer of it would be another one now; name "
            "the text by data=..., which is read with the tokenizer that the run kept"
        )
    batches = TokenBatches(
        corpus, seq_len=config.model.seq_len, seed=config.seed, micro_batch_size=SEQUENCES, num_workers=0
    )
    end = opened.tokenizer.eos_id if config.data.document_mask else None
    calibration = list(_calibration(batches, corpus, config.model.seq_len, tokens))
    before = _losses(opened.model, batches, end)
    if way.rotate_residual:
        config = _rotated(opened.model, config)
    _convert(opened.model, config, way)
    layers = quant_linears(opened.model)
    if method == "mr_gptq" and not any(layer.numerics.fprop.right.rotates for layer in layers):
        say(
            f"recipe {config.recipe.name} does not rotate weights, as MR-GPTQ (arXiv 2509.23202) does: mr_gptq is GPTQ "
            "with searched scales here"
        )
    asked = {layer.name: layer.text for layer in layers}
    errors = _quantize_blocks(opened.model, calibration, end, way, Progress(directory.path / PARTIAL, task), say)
    after = _losses(opened.model, batches, end)
    bits = _bits_per_weight(opened.model)
    config = _with_chosen(config, opened.model, asked)
    _finish(directory, config, opened, after, task | {"bits_per_weight": bits}, errors, before)
    return Quantised(out, tuple(errors), before["val_loss"], after["val_loss"], bits)


# --------------------------------------------------------------------------------------------------------------- source


def open_source(source: str, settings: Sequence[str]) -> Source:
    """A run directory, or a Hugging Face checkpoint by folder or name. UserError where it is neither."""
    path = Path(source).expanduser()
    if (path / "config.yaml").exists():
        return _open_run(path, settings)
    config = compose([f"model=hf:{source}", *settings])
    tokenizer = load_pretrained(config.tokenizer)
    assert config.model.vocab_size is not None  # a checkpoint says it
    model = Decoder(config.model, config.model.vocab_size)
    hf.load(model, source)
    values = {"vocab_size": config.model.vocab_size, "samples": 0, "commits": []}
    return Source(config, model.eval(), tokenizer, config.tokenizer, 0, values)


def _open_run(path: Path, settings: Sequence[str]) -> Source:
    directory = RunDirectory(path)
    own, asked = directory.read_config(), compose(settings)
    for setting in settings:
        if not setting.startswith("-") and re.split(r"[.=@]", setting.lstrip("+~"))[0] not in OF_A_RUN:
            raise UserError(
                f"{path} is a run, whose own settings hold but for {', '.join(OF_A_RUN)}; found {setting!r}; leave it "
                "out, or quantise what `qtrain export --to hf` makes of the run"
            )
    if own.tune is not None:
        raise UserError(
            f"{path} trained beside a base, or parts of it; export it by `qtrain export --to hf`, which merges both, "
            "and quantise that folder"
        )
    found = checkpoint.newest(directory.checkpoints)
    if found is None:
        raise UserError(f"{path} has no checkpoint yet")
    step, folder = found
    values = checkpoint.values_of(folder)
    vocab_size = checkpoint.whole_number(folder, values, "vocab_size")
    update: dict[str, Any] = {"recipe": asked.recipe, "backend": asked.backend, "gemm": asked.gemm}
    tokenizer_config = own.tokenizer
    if any(setting.lstrip("+").startswith("data") for setting in settings):
        update["data"] = asked.data
        if own.tokenizer.kind == "bpe":  # which another text would train anew
            tokenizer_config = TokenizerConfig(kind="huggingface", vocab_size=None, path=str(directory.tokenizer))
    model = Decoder(own.model, vocab_size)
    there = checkpoint.weights(folder)
    if any(name.endswith(".codes") for name in there):
        raise UserError(f"{path} is quantised already; quantise the run that it was made of")
    wanted = {name for name, _ in model.named_parameters()}
    model.load_state_dict({name: value for name, value in there.items() if name in wanted}, strict=False)
    tokenizer = load_kept(own.tokenizer, directory.tokenizer)
    return Source(own.model_copy(update=update), model.eval(), tokenizer, tokenizer_config, step, values)


def _calibration(batches: TokenBatches, corpus: Any, seq_len: int, tokens: int) -> Iterator[Tensor]:
    """(B, T) of the first samples of the run's order."""
    wanted = tokens // seq_len // SEQUENCES * SEQUENCES
    there = sum(part.corpus.train.n_tokens for part in corpus.parts)
    if wanted == 0 or wanted * seq_len > there:
        raise UserError(
            f"calibration on {tokens:,} tokens takes at least {SEQUENCES} sequences of {seq_len} tokens and no text "
            f"twice; the training split of the text has {there:,}; give more text (data=...), or another --tokens"
        )
    for batch in batches.train(0, wanted):
        yield ids_of(batch[:, :-1])


def _losses(model: Decoder, batches: TokenBatches, end_of_document: int | None) -> dict[str, float]:
    """val_loss and the rest of a run's own validation."""
    sets, device = batches.validation, torch.device("cpu")
    sums = {
        name: evaluate(model, each.batches(), device, "32-true", end_of_document=end_of_document)
        for name, each in sets.items()
    }
    return validation_values(sets, sums)


# --------------------------------------------------------------------------------------------------------------- blocks


def _rotated(model: Decoder, config: Config) -> Config:
    """Turns the residual stream; the settings of the model, whose head has its own weight from here on."""
    try:
        rotate_residual(model, config.seed)
    except (AttributeError, ValueError) as error:
        raise UserError(f"the residual stream of {config.model.name} cannot be rotated: {error}") from None
    return config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": False})})


def _convert(model: Decoder, config: Config, way: Way) -> None:
    """Layers that compute in high precision until each is quantised. UserError for a recipe that quantises no layer,
    whose weights have no codes that stay or whose scales are learned, for a head that is the embedding, and for a rank
    that a weight does not have."""
    convert(model, config.recipe, seed=config.seed, backend=config.backend, gemm=config.gemm)
    layers = quant_linears(model)
    if not layers:
        raise UserError(
            f"recipe {config.recipe.name} quantises no layer of the model; name one that does, as recipe=w4a16"
        )
    for layer in layers:
        if (reason := unsettled(layer.numerics)) is not None:
            raise UserError(f"recipe {config.recipe.name} cannot quantise {layer.name} for good: {reason}")
        if layer.numerics.learns:
            raise UserError(
                f"recipe {config.recipe.name} learns a scale of {layer.name} in training, and nothing is trained here; "
                "train with the recipe, or take one whose scales are computed"
            )
        if layer.weight is model.embed.weight:
            raise UserError(
                f"{layer.name} has the weight of the embedding, which stays as it is; leave it out by recipe.skip="
                f"[{layer.name}], or quantise a model with model.tie_embeddings=false"
            )
        if way.low_rank > (most := min(layer.weight.shape)):
            raise UserError(
                f"{layer.name}: the error of its weight has a rank of at most {most}, and --low-rank is "
                f"{way.low_rank}; ask for less"
            )
        if way.formats:
            try:
                in_all_minifloats(layer.numerics)
            except ValueError as error:
                raise UserError(
                    f"recipe {config.recipe.name} leaves no choice of formats for {layer.name}: {error}"
                ) from None
    set_high_precision(model)


def _with_chosen(config: Config, model: Decoder, asked: Mapping[str, str]) -> Config:
    """The settings under which layers have the formats that were chosen for them, where these are others than the
    recipe's. asked: numerics by the recipe, as text."""
    chosen = {
        layer.name: layer.numerics.recipe
        for layer in model.modules()
        if isinstance(layer, PackedLinear) and layer.text != asked[layer.name]
    }
    others = {pattern: other for pattern, other in config.recipe.overrides.items() if pattern not in chosen}
    recipe = config.recipe.model_copy(update={"overrides": chosen | others})  # the first that matches holds
    return config.model_copy(update={"recipe": recipe})


def _quantize_blocks(
    model: Decoder,
    calibration: Sequence[Tensor],
    end_of_document: int | None,
    way: Way,
    progress: Progress,
    say: Report,
) -> list[LayerError]:
    found: list[LayerError] = []
    with torch.no_grad():
        inputs = [
            Input(model.embed(tokens), documents_in(tokens, end_of_document).get("cu_seqlens"))
            for tokens in calibration
        ]
        for number, (name, block, run) in enumerate(_blocks(model)):
            done = progress.folder / f"{number:05d}.safetensors"
            if done.exists():
                found += _restore(model, name, done)
            else:
                errors = list(_quantize_block(model, block, run, inputs, way, say))
                progress.begin()
                _save(model.get_submodule(name), done, errors)
                found += errors
            inputs = [each._replace(x=run(each)) for each in inputs] if name != "lm_head" else []
    return found


def _blocks(model: Decoder) -> Iterator[tuple[str, nn.Module, Run]]:
    """(name, block, what it makes of its input), and the head, which reads the last norm."""

    def block(layer: nn.Module) -> Run:
        def run(given: Input) -> Tensor:
            tables = (getattr(model, name)[: given.x.shape[1]] for name in model._tables)
            return layer(given.x, *tables, given.cu_seqlens)

        return run

    for number, layer in enumerate(model.layers):
        yield f"layers.{number}", layer, block(layer)
    yield "lm_head", model.lm_head, lambda given: model.lm_head(model.norm(given.x))


def _quantize_block(
    model: Decoder, block: nn.Module, run: Run, inputs: Sequence[Input], way: Way,
    say: Report,
) -> Iterator[LayerError]:  # fmt: skip
    for group in _groups(block, run, inputs[0]):
        seen = _watched(group[0], run, inputs)
        rows = _rows(group[0], run, inputs[: SAMPLES // SEQUENCES]) if way.reads_rows else None
        norm, readers = _norm_before(block, group) if way.smooth is not None else (None, ())
        if norm is not None:
            factors = _smoothing(group, seen, way.smooth, rows)
            divide_inputs(norm, readers, factors)
            seen, rows = seen.divided(factors), None if rows is None else rows / factors
        for layer in group:
            packed, error = _quantize_layer(layer, seen, way, rows)
            _replace(model, packed)
            chosen = f", {error.x} x {error.w}" if way.formats else ""
            say(
                f"{layer.name:<28} error {error.error:.2e}, to nearest {error.nearest:.2e}, {error.bits:.4g} bits a "
                f"weight{chosen}"
            )
            yield error


def _groups(block: nn.Module, run: Run, given: Input) -> list[list[QuantLinear]]:
    """The quantised layers of a block in the order of their calls, those that read one and the same input together."""
    found: dict[int, list[QuantLinear]] = defaultdict(list)
    read: list[Tensor] = []  # held, so that no other tensor takes their place

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0])
        found[inputs[0].data_ptr()].append(layer)  # pyright: ignore[reportArgumentType]

    hooks = [layer.register_forward_pre_hook(note) for layer in quant_linears(block)]
    try:
        run(given)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


@dataclass(frozen=True)
class Inputs:
    """Of a layer over the calibration text, of each feature: moments (K, K), as `Hessian`; the largest and the mean
    magnitude (K,)."""

    moments: Tensor
    largest: Tensor
    mean: Tensor

    def divided(self, factors: Tensor) -> Inputs:
        """Of the same inputs, each feature divided by one of the factors (K,)."""
        return Inputs(self.moments / factors / factors[:, None], self.largest / factors, self.mean / factors)


def _watched(layer: QuantLinear, run: Run, inputs: Sequence[Input]) -> Inputs:
    hessian, total, largest = Hessian(layer.in_features), 0.0, torch.zeros(layer.in_features)

    def note(x: Tensor) -> None:
        nonlocal total, largest
        hessian.add(x)
        total, largest = total + x.abs().sum(0), torch.maximum(largest, x.abs().amax(0))

    _watch(layer, run, inputs, note)
    return Inputs(hessian.mean(), largest, torch.as_tensor(total) / hessian.tokens)


def _rows(layer: QuantLinear, run: Run, inputs: Sequence[Input]) -> Tensor:
    """(T, K): the inputs of a layer."""
    found: list[Tensor] = []
    _watch(layer, run, inputs, found.append)
    return torch.cat(found)


def _watch(layer: QuantLinear, run: Run, inputs: Sequence[Input], note: Callable[[Tensor], None]) -> None:
    """note: is given the inputs of a layer, (T, K) float32, forward by forward."""

    def hooked(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        note(given[0].reshape(-1, layer.in_features).float())

    hook = layer.register_forward_pre_hook(hooked)
    try:
        for each in inputs:
            run(each)
    finally:
        hook.remove()


def _norm_before(block: nn.Module, group: Sequence[QuantLinear]) -> tuple[nn.Module | None, Sequence[nn.Module]]:
    """The norm that these layers read, and all that read it, quantised or not; (None, ()) where they read no norm."""
    for norm, names in AFTER_NORM.items():
        try:
            readers = [block.get_submodule(name) for name in names]
            if {*group} <= {*readers}:
                return block.get_submodule(norm), readers
        except AttributeError:
            continue
    return None, ()


def _smoothing(group: Sequence[QuantLinear], seen: Inputs, smooth: Smooth | None, rows: Tensor | None) -> Tensor:
    weights = [layer.weight.detach().float() for layer in group]
    if smooth == "exponents":
        assert rows is not None
        return best_exponent_biases(group, seen.largest, rows)
    if smooth == "awq":
        quantizers = [layer.numerics.fprop.right for layer in group]
        return awq_smoothing(seen.mean, weights, seen.moments, quantizers)
    assert smooth is not None
    return smoothing(seen.largest, weights, smooth)


def best_exponent_biases(group: Sequence[QuantLinear], largest: Tensor, rows: Tensor) -> Tensor:
    """(K,) `exponent_biases` of layers that read the same inputs (T, K), of largest magnitudes (K,). All ones where the
    inputs are not quantised.

    At most as many powers of two as the inputs' exponents have are folded, so many as give the least squared error of
    the layers' outputs to nearest. LLM-FP4 (arXiv 2310.16836) takes all, and has biases of every layer's inputs, also
    of those without a norm before them.
    """
    best, least, plan = torch.ones_like(largest), inf, group[0].numerics.fprop.left.plan
    wanted = [layer(rows) for layer in group]
    for most in range(2 ** exponent_bits(plan.element) if plan is not None else 0):
        factors, error = exponent_biases(largest, most), 0.0
        for layer, output in zip(group, wanted, strict=True):
            set_high_precision(layer, False)
            found = functional_call(layer, {"weight": layer.weight * factors}, (rows / factors,))
            set_high_precision(layer)
            error += (found - output).square().sum().item()
        if error < least:
            best, least = factors, error
    return best


def _replace(model: nn.Module, packed: PackedLinear) -> None:
    """Puts a packed layer where the layer of its name is."""
    parent, _, child = packed.name.rpartition(".")
    setattr(model.get_submodule(parent), child, packed)


def _keys(layer: QuantLinear) -> Tensor:
    return key_table([layer.keyed_by], 0, 0)[0]


def _quantize_layer(layer: QuantLinear, seen: Inputs, way: Way, rows: Tensor | None) -> tuple[PackedLinear, LayerError]:
    """seen: of its inputs before their rotation; rows: (T, K) of these, for a way that reads them."""
    try:
        plain = pack_layer(layer, seen, Way())
        if way.formats and rows is not None:
            chosen = pack_in_best_formats(layer, seen, way, rows)
        else:
            chosen = pack_layer(layer, seen, way)
    except ValueError as error:
        raise UserError(f"{layer.name}: {error}") from None
    weight = layer.weight.detach().float()
    error, nearest = (relative_error(weight, whole_weight(each), seen.moments) for each in (chosen, plain))
    formats = (str(side.spec.format) for side in (chosen.numerics.fprop.left, chosen.numerics.fprop.right))
    return chosen, LayerError(layer.name, error, nearest, whole_bits(chosen), *formats)


def pack_in_best_formats(layer: QuantLinear, seen: Inputs, way: Way, rows: Tensor) -> PackedLinear:
    """`pack_layer` in the formats of inputs and weights that have as many bits as the layer's own, and of which the
    product of the two has the least squared error on inputs (T, K); of equal ones the layer's own.

    Source: LLM-FP4, arXiv 2310.16836. All pairs of formats are tried, where LLM-FP4 takes turns between the two three
    times. The scales of inputs follow the recipe's rule, where LLM-FP4 searches one for all inputs of a layer. Those of
    weights are chosen as `way` says: by method llm_fp4, for the squared error that the second moments of the inputs
    weigh by column, from the rule's scale down to a fifth of it, where LLM-FP4 takes the error of outputs, and scales
    exponent biases by 0.01 to 1.2.
    """
    wanted = nn.functional.linear(rows, layer.weight.float(), layer.bias)
    best, least = None, inf
    for candidates in in_all_minifloats(layer.numerics).values():
        layer.text = candidates[0].text
        packed = pack_layer(layer, seen, way)
        for numerics in candidates:
            packed.text = numerics.text
            error = (packed(rows) - wanted).square().sum().item()
            if error < least:
                best, least = (packed, numerics.text), error
    assert best is not None, "the error of no format is finite"
    packed, packed.text = best
    return packed


def pack_layer(layer: QuantLinear, seen: Inputs, way: Way) -> PackedLinear:
    """A layer whose weight is quantised in a way. ValueError where a method, a split or a rank does not fit it, where a
    scale overflows, and where its outliers take 16 bits a weight or more."""
    numerics, method, split = layer.numerics, way.weight, way.split
    rotation = Call(numerics, _keys(layer), torch.float32, None).rotation("fprop", layer.in_features)
    whole, columns = layer.weight.detach().float(), split.columns_of(seen.largest)
    moments = eliminated(seen.moments, columns, method.damping) if method.compensation == "gptq" else seen.moments
    moments = moments.index_fill(0, columns, 0.0).index_fill(1, columns, 0.0)
    moments = rotate(rotate(moments, rotation, numerics.backend).T.contiguous(), rotation, numerics.backend)
    weight = rotate(whole.index_fill(1, columns, 0.0), rotation, numerics.backend)
    quantizer, outliers = numerics.fprop.right, None
    if split.weights is not None:
        outliers = sensitive(weight, moments, quantizer, split.weights, method.damping)
    codes, beside = quantize_weight(weight, moments, quantizer, method, outliers)
    kept = Outliers.of(columns, whole[:, columns], beside)
    if not codes.dequantize(numerics.backend).isfinite().all():
        raise ValueError(
            f"{quantizer.spec.format} does not hold its weights, whose largest magnitude is {whole.abs().max():.3g}: a "
            "scale overflows; take a format whose scales reach farther, or leave the layer out by recipe.skip"
        )
    codes = codes.to(layout_of(numerics, codes.shape), numerics.backend)
    packed = PackedLinear(codes, layer.bias, numerics, layer.name, _keys(layer), outliers=kept)
    if kept is not None and (bits := 8 * kept.nbytes() / whole.numel()) >= 16:
        raise ValueError(
            f"{kept.columns.numel()} columns and {kept.values.numel()} elements as outliers take {bits:.3g} bits "
            "a weight by themselves, no less than the 16 of an unquantised one; ask for fewer columns or higher bounds"
        )
    if kept is not None and method.compensation == "gptq":
        kept.column_weight = make_up(whole, packed.dequantize(), seen.moments, columns, method.damping).bfloat16()
    if way.low_rank:
        compensate(packed, whole, way.low_rank)
    return packed


def _bits_per_weight(model: nn.Module) -> float:
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    return sum(whole_bits(layer) * count for layer, count in zip(layers, weights, strict=True)) / sum(weights)


# ---------------------------------------------------------------------------------------------------------------- files


def _check(directory: RunDirectory, task: dict[str, Any]) -> None:
    """UserError where `out` holds anything but this task, not yet done."""
    if (directory.path / "config.yaml").exists():
        raise UserError(f"{directory.path} holds a finished model; give a new --out")
    there = read_json(directory.path / PARTIAL / "task.json")
    if directory.path.exists() and there != task:
        differing = [key for key in task if there.get(key) != task[key]]
        raise UserError(
            f"{directory.path} holds no quantisation of this kind"
            + (f" (it has another {', '.join(differing)})" if there else "")
            + "; give a new --out, or remove it"
        )


@dataclass(frozen=True)
class Progress:
    """The folder of finished blocks, and the task that they belong to."""

    folder: Path
    task: dict[str, Any]

    def begin(self) -> None:
        """Before the first block is written: what is refused within it leaves no folder behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "task.json", json.dumps(self.task, indent=2) + "\n")


def _save(block: nn.Module, path: Path, errors: Sequence[LayerError]) -> None:
    checkpoint.write_weights(path, block.state_dict(), {"errors": json.dumps([asdict(error) for error in errors])})


def _restore(model: Decoder, name: str, path: Path) -> list[LayerError]:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118  no mapping
        errors = json.loads(file.metadata()["errors"])
    formats = {error["layer"]: (error["x"], error["w"]) for error in errors}
    for layer in quant_linears(model.get_submodule(name)):
        layer.text = with_formats(layer.numerics, *formats[layer.name]).text
        place = layer.name.removeprefix(name).removeprefix(".")
        layout = layout_of(layer.numerics, (layer.out_features, layer.in_features))
        weight = QTensor.of(layout, [tensors[f"{place}.{name}".removeprefix(".")] for name in layout.names])
        _replace(model, PackedLinear(weight, layer.bias, layer.numerics, layer.name, _keys(layer)))
    reserve_beside(model.get_submodule(name), {f"{name}.{part}": value.shape for part, value in tensors.items()})
    model.get_submodule(name).load_state_dict(tensors)
    return [LayerError(**error) for error in errors]


def _finish(
    directory: RunDirectory, config: Config, source: Source, losses: dict[str, float], task: dict[str, Any],
    errors: Sequence[LayerError], before: dict[str, float],
) -> None:  # fmt: skip
    config = config.model_copy(update={"run_dir": None, "force": False})
    checkpoint.save(directory.checkpoints, source.step, checkpoint.tensors_of(source.model), source.values)
    directory.tokenizer.mkdir(exist_ok=True)
    for name, text in tokenizer_files(source.tokenizer).items():
        write_atomically(directory.tokenizer / name, text)
    all_parameters, others = count_parameters(config.model, source.model.vocab_size)
    summary = {
        "status": Status.FINISHED,
        "name": config.name,
        "recipe": config.recipe.name,
        "seed": config.seed,
        "parameters": all_parameters,
        "non_embedding_parameters": others,
        **losses,
        "config_hash": config_hash(config),
    }
    about = task | {"val_loss_before": before["val_loss"], "layers": [asdict(error) for error in errors]}
    write_atomically(directory.path / "quantization.json", json.dumps(about, indent=2) + "\n")
    directory.write_summary(summary)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(directory.path / "config.yaml", text)  # last: what has it is whole
    shutil.rmtree(directory.path / PARTIAL)
