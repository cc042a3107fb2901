"""What convert changes, what it leaves, and what it refuses before touching anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtrain
from qtrain.config.recipe import LinearRecipe, read_recipe
from qtrain.config.settings import configs_dir, group_names
from qtrain.errors import UserError
from qtrain.quant import QuantLinear, check_backend
from qtrain_kernels import dispatch


class Tied(nn.Module):
    """An embedding tied to lm_head, two blocks, one layer shared between them, and an attention of torch's own."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, width), "down": nn.Linear(width, 64)}) for _ in "ab"
        )
        self.shared = self.blocks[0]["up"]  # pyright: ignore[reportIndexIssue]
        self.attention = nn.MultiheadAttention(64, 2)
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.lm_head.weight = self.embed.weight


def test_swaps_in_place_and_says_what_it_did() -> None:
    model = Tied()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}
    keys = list(model.state_dict())
    report = qtrain.convert(model, "quartet", backend="reference")
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "shared"]
    assert report.converted == names
    assert report.skipped["lm_head"] == "named by skip (lm_head)"
    assert "NonDynamicallyQuantizableLinear" in report.skipped["attention.out_proj"]
    assert list(model.state_dict()) == keys
    assert {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)} == before
    assert model.lm_head.weight is model.embed.weight and type(model.lm_head) is nn.Linear
    assert model.shared is model.blocks[0]["up"] and isinstance(model.shared, QuantLinear)  # pyright: ignore
    assert str(report).splitlines()[0] == "recipe quartet: 5 of 7 linear layers converted"
    assert "fwd x:mxfp4/std" in str(report) and "skipped lm_head: named by skip (lm_head)" in str(report)


def test_the_report_says_where_a_recipe_differs_from_its_source() -> None:
    overrides = {"layers.0.*": "ste", "down": {"name": "ste", "bits": 2}}
    lines = str(qtrain.convert(Numbered(2), {"name": "lsq", "overrides": overrides}, backend="reference")).splitlines()
    for name in ("lsq", "ste"):
        recipe = read_recipe(name)
        assert recipe.source and recipe.deviations
        said = [f"  {name} is from: {recipe.source}", *(f"  {name} differs: {each}" for each in recipe.deviations)]
        assert [line for line in lines if line.startswith(f"  {name} ")] == said


@pytest.mark.parametrize(("skip", "left"), [
    ("lm_head", {"lm_head"}),
    (["down"], {"blocks.0.down", "blocks.1.down"}),
    (["blocks.0.*", "lm_head"], {"blocks.0.up", "blocks.0.down", "lm_head"}),
    ([], set()),
])  # fmt: skip
def test_skip_takes_names_and_patterns(skip: str | list[str], left: set[str]) -> None:
    model = Tied()
    model.attention = None  # pyright: ignore[reportAttributeAccessIssue]
    model.lm_head = nn.Linear(64, 96)
    assert set(qtrain.convert(model, "quartet", skip=skip, backend="reference").skipped) == left


def test_layers_whose_weight_or_call_is_not_plain_stay() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    hooks = {"after": "forward_hook", "before": "forward_pre_hook", "back": "full_backward_hook"}
    model = nn.ModuleDict({
        "computed": nn.utils.spectral_norm(nn.Linear(64, 64)),
        "parametrized": parametrized,
        **{name: nn.Linear(64, 64) for name in (*hooks, "replaced", "plain")},
    })  # fmt: skip
    model["replaced"].forward = lambda x: x
    for name, hook in hooks.items():
        getattr(model[name], f"register_{hook}")(lambda *_: None)
    report = qtrain.convert(model, "quartet", backend="reference")
    assert report.converted == ["plain"]
    assert "computed from other parameters" in report.skipped["computed"]
    assert "ParametrizedLinear" in report.skipped["parametrized"]
    assert all("carries hooks" in report.skipped[name] for name in hooks)
    assert "its forward was replaced" in report.skipped["replaced"]


@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_is_quantised_in_evaluation_too(whole: bool) -> None:
    """torch's fast path for inference reads the weights without calling the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if whole else layer
    x = torch.randn(4, 8, 64)
    padded = torch.zeros(4, 8, dtype=torch.bool)
    padded[0, 5:] = True
    arguments = {"src_key_padding_mask": padded}
    plain = model.eval()(x, **arguments)
    report = qtrain.convert(model, "ste", backend="reference")
    assert {name.rpartition(".")[2] for name in report.converted} == {"linear1", "linear2"}
    expected = model(x, **arguments)  # with gradients, for which torch has no fast path
    assert not torch.allclose(expected[~padded], plain[~padded], atol=1e-2)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(model.eval()(x, **arguments)[~padded], expected[~padded])


@pytest.mark.parametrize(("model", "recipe", "message"), [
    (nn.Linear(64, 64), "quartet", r"the 1 linear layers .*\(Linear\):\s+the model itself: .* torch.nn.Sequential"),
    (nn.ModuleDict({"lm_head": nn.Linear(64, 64)}), "quartet", r"lm_head: named by skip \(lm_head\)\s.*skip=\[\]"),
    (nn.MultiheadAttention(64, 2), "quest", r"out_proj: a NonDynamicallyQuantizableLinear"),
    (nn.Sequential(nn.Linear(64, 64)), {"name": "bf16", "overrides": {"0": "bf16"}}, None),
    (nn.Sequential(nn.Linear(64, 64)), {"name": "quest", "overrides": {"0": "bf16"}}, "0: recipe bf16 quantises"),
])  # fmt: skip
def test_a_recipe_that_would_convert_nothing_is_refused(model: nn.Module, recipe: object, message: str | None) -> None:
    if message is None:
        assert qtrain.convert(model, recipe).converted == []  # pyright: ignore[reportArgumentType]
        return
    with pytest.raises(UserError, match=rf"(?s)would convert none of .*{message}"):
        qtrain.convert(model, recipe, backend="reference")  # pyright: ignore[reportArgumentType]


def test_the_list_of_what_was_skipped_has_an_end() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    with pytest.raises(UserError, match=r"none of the 12 linear layers(?s:.*)7: named by skip.*\n  and 4 more\n"):
        qtrain.convert(model, "quartet", skip=["*"])


def test_an_error_while_building_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    build = QuantLinear.__init__

    def fails(self: QuantLinear, linear: nn.Linear, recipe: LinearRecipe, name: str, *rest: Any) -> None:
        if name == "blocks.1.down":
            raise RuntimeError("no memory")
        build(self, linear, recipe, name, *rest)

    monkeypatch.setattr(QuantLinear, "__init__", fails)
    model = Tied()
    with pytest.raises(RuntimeError, match="no memory"):
        qtrain.convert(model, "quartet", backend="reference")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_recipes_own_skip_must_match_but_for_lm_head() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    recipe = read_recipe("quartet")
    with pytest.raises(UserError, match=r"skip names 'lm_haed', which matches no linear layer; the nearest are 0"):
        qtrain.convert(model, recipe.model_copy(update={"skip": ("lm_haed",)}))
    assert qtrain.convert(model, recipe, backend="reference").converted == ["0"]  # its skip is lm_head


@pytest.mark.parametrize("field", [{"scale": "floor"}, {"rounding": "stochastic"}, {"estimator": "clip"}])
def test_format_none_takes_no_numerics(field: dict[str, str]) -> None:
    off = {"format": "none"}
    recipe = {"name": "own", "fprop": {"x": off, "w": off | field}} | {
        gemm: {"dy": off, other: off} for gemm, other in (("dgrad", "w"), ("wgrad", "x"))
    }
    with pytest.raises(UserError, match=rf"recipe own, fprop\.w: format none .*{next(iter(field))}"):
        qtrain.convert(nn.Sequential(nn.Linear(64, 64)), recipe)


def test_bf16_converts_nothing_and_says_why() -> None:
    model = Tied()
    report = qtrain.convert(model, "bf16")
    assert report.converted == [] and set(report.skipped.values()) == {"recipe bf16 quantises nothing"}
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize(("recipe", "skip", "message"), [
    ("quartett", None, "did you mean 'quartet'"),
    ("quartet", ["dwon"], r"'dwon', which matches no linear layer; the nearest are down"),
    ({"name": "quest", "bits": 9}, None, "bits=9"),
    ({"name": "quest", "format": "int9"}, None, "unknown format 'int9'"),
    ({"name": "quest", "format": "mxfp8_e4m3"}, None, "needs a Gaussian fit, which is not known for the codes"),
    ({"name": "quartet", "bits": 4}, None, "names its own format, so bits=4 would change nothing"),
    ({"name": "quest", "colour": 1}, None, "unknown key 'colour'"),
    ("quest", None, r"in_features % 128 == 0 for fprop.x \(int4/.*had128/trust\), and finds 64; set "
     r"recipe.fprop.x.rotation=hadamard64 recipe.fprop.w.rotation=hadamard64, choose"),
])  # fmt: skip
def test_refuses_and_leaves_the_model_untouched(recipe: object, skip: list[str] | None, message: str) -> None:
    model = Tied()
    with pytest.raises(UserError, match=message):
        qtrain.convert(model, recipe, skip=skip)  # pyright: ignore[reportArgumentType]
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_any_number_of_out_features_is_converted() -> None:
    """Quartet's dgrad runs over N in blocks of 32, to which zeros fill it; tests/test_recipes.py has the values."""
    for recipe in ("quartet", "quest"):
        assert qtrain.convert(nn.Sequential(nn.Linear(128, 100)), recipe).converted == ["0"]


def test_a_rotation_of_all_out_features_needs_a_hadamard_matrix() -> None:
    turned, none = {"format": "none", "rotation": "hadamard"}, {"format": "none"}
    recipe = {"name": "own", "fprop": {"x": none, "w": none}, "wgrad": {"dy": none, "x": none}}
    with pytest.raises(UserError, match="hadamard257: no Hadamard matrix"):
        qtrain.convert(nn.Sequential(nn.Linear(64, 257)), recipe | {"dgrad": {"dy": turned, "w": turned}})


def test_a_second_conversion_raises() -> None:
    model = Tied()
    qtrain.convert(model, "quartet", backend="reference")
    with pytest.raises(UserError, match="converted already"):
        qtrain.convert(model, "bf16")


def test_a_model_without_linear_layers_and_a_seed_that_is_none_raise() -> None:
    with pytest.raises(UserError, match=r"the model \(ReLU\) holds no nn.Linear"):
        qtrain.convert(nn.ReLU(), "quartet")
    with pytest.raises(UserError, match="seed is 'a'; give an integer"):
        qtrain.convert(nn.Sequential(nn.Linear(32, 32)), "quartet", seed="a")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quest_takes_bits_and_formats(bits: int) -> None:
    model = nn.Sequential(nn.Linear(128, 32))
    report = qtrain.convert(model, {"name": "quest", "bits": bits}, backend="reference")
    assert all(f"x:int{bits}/gaussian/nearest/had128/trust" in text for text in report.numerics.values())
    assert len(model(torch.eye(128)).unique()) > 1


def test_the_package_offers_its_five_names() -> None:
    assert {"bf16", "quest", "quartet", "quartet_v1"} <= set(qtrain.recipes())
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        qtrain.quantise  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_a_backend_that_cannot_work_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain_kernels.dispatch._cpp_obstacle", lambda: "no C++ compiler was found; install g++")
    dispatch.resolve.cache_clear()
    try:
        check_backend("auto", "auto", "cpu")
        with pytest.raises(UserError, match=r"'compiled' cannot run on cpu: no C\+\+ compiler.*backend 'reference'"):
            check_backend("compiled", "auto", "cpu")
    finally:
        dispatch.resolve.cache_clear()


class Numbered(nn.Module):
    """Seven blocks of two layers, and a head."""

    def __init__(self, blocks: int = 7) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)}) for _ in range(blocks)
        )
        self.lm_head = nn.Linear(64, 100)


@pytest.mark.parametrize(("first", "last", "left"), [
    (2, 1, {0, 1, 6}), (0, 0.15, {6}), (0.3, 0, {0, 1}), (0, 0, set()), (0, 0.05, set()),
])  # fmt: skip
def test_first_and_last_blocks_stay_in_high_precision(first: float, last: float, left: set[int]) -> None:
    model = Numbered()
    report = qtrain.convert(model, {"name": "quartet", "first_blocks": first, "last_blocks": last}, backend="reference")
    assert {int(name.split(".")[1]) for name in report.skipped if name != "lm_head"} == left
    assert {int(name.split(".")[1]) for name in report.converted} == set(range(7)) - left
    if (first, last) == (2, 1):
        assert report.skipped["layers.1.up"] == "in the first 2 blocks"
        assert "skipped layers.6.up, layers.6.down: in the last block" in str(report)
        assert type(model.layers[6]["up"]) is nn.Linear  # pyright: ignore[reportIndexIssue]


def test_overrides_take_the_first_pattern_that_matches() -> None:
    model = Numbered(2)
    overrides = {"layers.0.*": "ste", "down": {"name": "ste", "bits": 2}, "up": "quartet"}
    report = qtrain.convert(model, {"name": "quartet_v1", "overrides": overrides}, backend="reference")
    kinds = {name: text.split()[1].split("/")[0] for name, text in report.numerics.items()}
    assert kinds == {
        "layers.0.up": "x:int4",
        "layers.0.down": "x:int4",
        "layers.1.up": "x:mxfp4",
        "layers.1.down": "x:int2",
    }
    assert "layers.0.up, layers.0.down:\n" in str(report) and "fprop int2 x int2," in repr(model)
    assert report.skipped == {"lm_head": "named by skip (lm_head)"}
    head = {"name": "ste", "overrides": {"lm_head": "quartet"}}  # an override comes before the recipe's own skip
    model = Numbered(2)
    model.lm_head = nn.Linear(64, 96)
    assert "lm_head" in qtrain.convert(model, head, backend="reference").converted
    bare = {"name": "ste", "overrides": {"*.up": "bf16"}}
    assert set(qtrain.convert(Numbered(2), bare, backend="reference").converted) == {"layers.0.down", "layers.1.down"}


@pytest.mark.parametrize(("change", "message"), [
    ({"overrides": {"*.upp": "bf16"}}, r"recipe\.overrides names '\*\.upp', which matches no linear layer"),
    ({"overrides": {"up": "qest"}}, r"unknown recipe 'qest'; did you mean 'quest'\?"),
    ({"overrides": {"up": {"name": "quest", "bit": 2}}}, r"unknown key 'bit'"),
    ({"first_blocks": 4, "last_blocks": 3}, r"first 4 and the last 3 blocks .* the model has 7 numbered blocks"),
    ({"overrides": {"up": {"name": "quest", "last_blocks": 1, "skip": ["down"]}}}, r"skip, last_blocks belong to"),
    ({"overrides": None}, r"give \{pattern: recipe, \.\.\.\}, \{\} for none"),
    ({"overrides": {"up": 3}}, r"a recipe is a name, a mapping or a LinearRecipe; got int 3"),
    ({"first_blocks": 1.5}, r"a number of blocks, or a fraction of them below 1"),
    ({"high_precision_after": 1.0}, r"high_precision_after=1\.0: Input should be less than 1"),
])  # fmt: skip
def test_what_the_model_does_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        qtrain.convert(Numbered(), {"name": "quartet", **change}, backend="reference")


@pytest.mark.parametrize(("gemm", "operand", "change", "message"), [
    ("fprop", "x", {"format": "mxfp4", "rounding": "eden"}, "eden corrects minifloat block scales"),
    ("fprop", "x", {"format": "nvfp4", "correction": 32}, "correction is of rounding eden; the rounding is nearest"),
    ("fprop", "x", {"format": "nvfp4", "rounding": "eden", "correction": 24}, "correction=24 must be a multiple of"),
    ("fprop", "x", {"format": "int4", "scale": "learned", "rounding": "stochastic"}, "learned .* rounds to nearest"),
    (
        "fprop", "x", {"format": "int4/row/float32", "scale": "learned"},
        "of inputs is one number for the whole tensor, .* write int4/tensor/float32",
    ),
    ("fprop", "w", {"format": "int4/16x16/float32", "scale": "learned"}, "not for tiles of rows"),
    ("fprop", "x", {"format": "mxfp4", "scale": "learned"}, "scale 'learned' does not give mxfp4's e8m0 scales"),
    ("fprop", "x", {"format": "e2m1/16x16/e4m3", "sparsity": "2:4"}, "sparsity 2:4 needs blocks of a multiple of 8"),
    ("fprop", "x", {"format": "int4", "clip_scale": 2.0}, "clip_scale is of estimator clip; the estimator is ste"),
    ("fprop", "x", {"format": "int4", "row_rotation": "hadamard32"}, r"row_rotation is for dgrad\.dy"),
    ("wgrad", "dy", {"format": "int4", "rotation": "hadamard"}, "wgrad contracts over tokens, however many"),
    ("dgrad", "w", {"format": "int4", "scale": "learned"}, "learned belong to the operands of fprop"),
    ("fprop", "x", {"format": "e9m3/32/e8m0"}, "element 'e9m3': e must be 1 to 5"),
    ("fprop", "x", {"format": "int4/32/e8m0"}, "int4 has no zero and e8m0 neither, so zeros would not stay zeros"),
    ("fprop", "x", {"format": "e2m1/row/e8m0"}, "one scale per row is a float32; got 'e8m0'"),
    ("fprop", "x", {"format": "e2m1/32"}, "has three parts, element/block/scale"),
    ("fprop", "x", {"format": "e2m1/32/ue5m9"}, "unknown scale format 'ue5m9'"),
])  # fmt: skip
def test_a_spec_that_does_not_fit_its_place_is_refused(
    gemm: str, operand: str, change: dict[str, Any], message: str
) -> None:
    none: dict[str, Any] = {"format": "none"}
    tree = {
        "name": "own",
        "fprop": {"x": none, "w": none},
        "dgrad": {"dy": none, "w": none},
        "wgrad": {"dy": none, "x": none},
    }
    tree[gemm] = {**tree[gemm], operand: change}  # pyright: ignore[reportGeneralTypeIssues]
    with pytest.raises(UserError, match=message):
        read_recipe(tree)


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((configs_dir() / "recipe" / "quartet_v1.yaml").read_text().replace("name: quartet_v1\n", ""))
    for given in (path, str(path)):
        model = nn.Sequential(nn.Linear(64, 64))
        report = qtrain.convert(model, given, backend="reference")
        assert report.recipe == "mine" and report.numerics["0"] == numerics_of("quartet_v1")
    path.write_text("name: quest\nbits: 3\n")  # as the mapping of the same words
    assert "x:int3/" in qtrain.convert(nn.Sequential(nn.Linear(128, 64)), path, backend="reference").numerics["0"]


def numerics_of(recipe: str) -> str:
    return qtrain.convert(nn.Sequential(nn.Linear(64, 64)), recipe, backend="reference").numerics["0"]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("mine.yaml", "name: quartett", r"recipe file .*mine.yaml: unknown recipe 'quartett'; did you mean 'quartet'"),
    ("mine.yaml", "a: [", r"cannot read the recipe file .*mine.yaml line 1: ParserError"),
    ("mine.yaml", "- 1", r"mine.yaml holds list, not a mapping"),
    ("mine.yaml", "name: quest\nbit: 3", r"recipe file .*mine.yaml: unknown key 'bit' .*did you mean 'bits'"),
    ("mien.yaml", "", r"there is no recipe file .*mine.yaml; did you mean 'mien.yaml'"),
])  # fmt: skip
def test_an_error_of_a_recipe_file_names_it(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(UserError, match=message):
        qtrain.convert(model, tmp_path / "mine.yaml")
    assert type(model[0]) is nn.Linear


def test_each_recipe_is_told_in_a_line() -> None:
    told = qtrain.recipes()
    assert list(told) == group_names("recipe") and not any("\n" in line for line in told.values())
    assert told["quartet"].startswith("mxfp4 forward and backward. Quartet, arXiv 2505.14669")
    assert told["quest"].startswith("int4 forward, 16-bit x int4 backward. QuEST")
    assert told["mxfp4_backward"].startswith("16-bit forward, mxfp4 backward. ")
    assert told["trilm"].startswith("16-bit x int1.585/tensor/float32 forward, ")
