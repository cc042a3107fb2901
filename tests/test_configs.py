"""Every shipped config composes and validates; the ladder and the papers' experiments say what was published."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import qtrain
from qtrain.config import config_hash
from qtrain.config.recipe import read_recipe
from qtrain.config.settings import configs_dir, group_names, parse
from qtrain.models.decoder import Decoder, count_parameters
from qtrain.models.families.llama import Llama
from qtrain.plan import RunPlan, make_plan
from qtrain.runs.table import read_csv
from qtrain.train import compose, compose_all, jobs_of

ROOT = Path(__file__).parents[1]

# Quartet, arXiv 2505.14669, tables 4 and 5, and the released main_setup.sh; counts from the released run data.
# size: layers, width, heads, nominal parameters, non-embedding parameters, learning rate
LADDER = {
    "30m": (6, 640, 5, 30e6, 30_482_560, 0.0012),
    "50m": (7, 768, 6, 50e6, 49_556_736, 0.0012),
    "100m": (8, 1024, 8, 100e6, 102_777_856, 0.0006),
    "200m": (10, 1280, 10, 200e6, 203_188_480, 0.0003),
    "430m": (13, 1664, 13, 430e6, 443_068_288, 0.00015),
    "800m": (16, 2048, 16, 800e6, 822_151_168, 0.000075),
}
LARGER = {"1600m": (20, 2560, 20, 1600e6), "3200m": (28, 3072, 24, 3200e6), "7b": (32, 4096, 32, 7000e6)}
CPU_SIZES = {"nano": (2, 128, 2, 384), "micro": (4, 128, 2, 384), "mini": (4, 256, 4, 768)}
RECIPES = qtrain.recipes()
IN_THE_PAPER = ("bf16", "quest", "quartet", "quartet_v1")  # of Quartet
ONLY_THE_USER_KNOWS = {
    "data=text": ["data.files=corpus/*"],
    "data=jsonl": ["data.files=corpus/*"],
    "data=parquet": ["data.files=corpus/*"],
    "data=chat": ["data.files=corpus/*"],
    "data=datatrove": ["data.files=corpus/*"],
    "data=megatron": ["data.files=corpus/*"],
    "data=mixture": ["+data@data.parts.own=stdlib", "data.weights={own: 1}"],
    "tokenizer=huggingface": ["tokenizer.path=tokenizer.json"],
    # As a run keeps it, which needs the checkpoint no more.
    "model=hf": [
        *("model.init_from=llama", "model.init_hash=abc", "model.name=hf", "model.dim=64", "model.ffn_dim=64"),
        *("model.n_layers=1", "model.n_heads=1", "model.seq_len=8"),
    ],
}
GROUPS = sorted(
    path.name for path in configs_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "experiment")
)

DEFAULTS = yaml.safe_load((configs_dir() / "train.yaml").read_text())["defaults"]
GROUPS_IN_DEFAULTS = {group for entry in DEFAULTS if isinstance(entry, dict) for group in entry}


def plan(*overrides: str) -> RunPlan:
    return make_plan(compose(overrides))


def model_config(name: str) -> Llama:
    return parse(Llama, yaml.safe_load((configs_dir() / "model" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in group_names(group)])
def test_every_option_of_every_group_composes(choice: str) -> None:
    group, name = choice.split("=")
    plus = "" if group in GROUPS_IN_DEFAULTS else "+"
    config = compose([f"{plus}{choice}", *ONLY_THE_USER_KNOWS.get(choice, [])])
    if group in ("model", "recipe", "optimizer", "scheduler"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize("name", group_names("experiment"))
def test_every_experiment_composes_and_can_be_planned(name: str) -> None:
    config = compose([f"+experiment={name}"])
    assert make_plan(config, vocab_size=config.model.vocab_size or 257).steps > 100


def test_experiments_are_listed_without_their_shared_parts() -> None:
    names = group_names("experiment")
    assert {*RECIPES, "paper/quartet_30m", "paper/bf16_800m"} <= set(names)
    assert not [name for name in names if any(part.startswith("_") for part in name.split("/"))]


def test_every_recipe_has_an_experiment_and_a_place_in_the_readme() -> None:
    """A row of the README's table begins with the names of its recipes; the table names no others."""
    readme = (configs_dir().parent / "README.md").read_text()
    table = readme.split("| recipe | what it is | source |\n", 1)[1].split("\n\n", 1)[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(RECIPES)
    assert set(RECIPES) <= set(group_names("experiment"))


def test_every_recipe_names_its_source_and_the_readme_says_where_it_differs() -> None:
    """Below the README's table, a list's entry begins with the recipes that it is about and holds their sentences."""
    readme = (configs_dir().parent / "README.md").read_text()
    details = readme.split("<summary>Where recipes differ from their sources</summary>", 1)[1].split("</details>", 1)[0]
    entries = [" ".join(entry.split()) for entry in details.split("\n- ")[1:]]
    about = {entry: re.findall(r"`(\w+)`", entry.split(": ")[0]) for entry in entries}
    assert {name for names in about.values() for name in names} == {r for r in RECIPES if read_recipe(r).deviations}
    for name in RECIPES:
        recipe = read_recipe(name)
        assert recipe.source, f"{name} names no source"
        assert all(sentence.strip().endswith(".") for sentence in recipe.deviations), f"{name}: write whole sentences"
        listed = " ".join(entry.split(": ", 1)[1] for entry, names in about.items() if name in names)
        for deviation in recipe.deviations:
            assert deviation in listed, f"README.md lacks a deviation of {name}: {deviation}"
            listed = listed.replace(deviation, "", 1)
        assert not listed.strip(), f"README.md says what configs/recipe/{name}.yaml does not: {listed.strip()}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_experiment_differs_from_the_defaults_in_its_recipe_alone(recipe: str) -> None:
    default, config = compose().model_dump(), compose([f"+experiment={recipe}"]).model_dump()
    assert (config["name"], config["recipe"]["name"]) == (recipe, recipe)
    assert {key for key in default if default[key] != config[key]} <= {"name", "recipe"}


def test_the_command_line_beats_the_experiment() -> None:
    config = compose(
        ["+experiment=paper/quartet_30m", "recipe=bf16", "optimizer.lr=0.5", "model=llama_50m", "name=mine"]
    )
    assert (config.recipe.name, config.optimizer.lr, config.model.dim, config.name) == ("bf16", 0.5, 768, "mine")
    assert config.trainer.batch_tokens == 262_144


# ------------------------------------------------------------------------------------------------------------ the sizes


@pytest.mark.parametrize("name", CPU_SIZES)
def test_cpu_sizes(name: str) -> None:
    config = model_config(name)
    assert (config.n_layers, config.dim, config.n_heads, config.ffn_dim) == CPU_SIZES[name]
    assert config.seq_len == 256


@pytest.mark.parametrize("size", [*LADDER, *LARGER])
def test_the_ladder_is_the_published_one(size: str) -> None:
    layers, width, heads, nominal = {**LADDER, **LARGER}[size][:4]
    config = model_config(f"llama_{size}")
    assert (config.n_layers, config.dim, config.n_heads, config.nominal_parameters) == (layers, width, heads, nominal)
    assert (config.kv_heads, config.head_width, config.seq_len, config.vocab_size) == (heads, 128, 512, 32_000)
    assert (config.tie_embeddings, config.norm_eps, config.init_std, config.rope_theta) == (False, 1e-5, 0.02, 10_000)
    assert config.ffn_dim % 256 == 0
    assert 0 <= config.ffn_dim - int(8 * width / 3) < 256


@pytest.mark.parametrize("size", [*LADDER, *LARGER])
def test_parameter_counts_are_the_published_ones(size: str) -> None:
    config = model_config(f"llama_{size}")
    with torch.device("meta"):
        model = Decoder(config, 32_000)
    total = sum(parameter.numel() for parameter in model.parameters())
    non_embedding = total - 2 * 32_000 * config.dim
    assert count_parameters(config, 32_000) == (total, non_embedding)
    if size in LADDER:
        assert non_embedding == LADDER[size][4]


# ----------------------------------------------------------------------------------------------------------- the papers


@pytest.mark.parametrize("size", LADDER)
@pytest.mark.parametrize("recipe", IN_THE_PAPER)
def test_paper_experiments_have_the_published_settings(recipe: str, size: str) -> None:
    config = compose([f"+experiment=paper/{recipe}_{size}"])
    assert (config.name, config.recipe.name, config.model.name) == (f"{recipe}_{size}", recipe, f"llama_{size}")
    optimizer, scheduler, trainer = config.optimizer, config.scheduler, config.trainer
    assert optimizer.lr == LADDER[size][5]
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, trainer.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (str(scheduler), scheduler.warmup_fraction, scheduler.start_factor) == ("cosine", 0.1, 0.01)
    assert scheduler.final_factor == 0.1
    assert (trainer.batch_tokens, trainer.tokens, trainer.tokens_per_parameter) == (512 * 512, None, 100)
    assert (config.tokenizer.kind, config.tokenizer.path) == ("huggingface", "meta-llama/Llama-2-7b-hf")
    assert (config.data.source, config.data.path, config.data.subset) == ("huggingface", "allenai/c4", "en")


@pytest.mark.parametrize(
    ("ratio", "steps"), [(25, 2861), (50, 5722), (100, 11444), (200, 22888), (400, 45776), (800, 91552)]
)
def test_steps_of_the_30m_runs(ratio: int, steps: int) -> None:
    found = plan("+experiment=paper/quartet_30m", f"trainer.tokens_per_parameter={ratio}", "dry_run=true")
    assert (found.steps, found.warmup_steps) == (steps, steps // 10)
    assert found.non_embedding_parameters == 30_482_560


@pytest.mark.parametrize("size", LADDER)
def test_paper_runs_fit_one_device_and_eight(size: str) -> None:
    config, on_eight = (compose([f"+experiment=paper/quartet_{size}", f"trainer.devices={n}"]) for n in (1, 8))
    assert make_plan(config).micro_batches == 8 * make_plan(on_eight).micro_batches
    assert 16 * make_plan(config).parameters < 60 * 2**30  # leaves an 80 GB device room for activations


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("points.yaml")), ids=lambda path: path.parent.name)
def test_every_point_of_a_study_is_a_run(path: Path) -> None:
    """Names and settings compose, no run has two names, and the committed rows are found by the names of today."""
    tree = yaml.safe_load(path.read_text())
    assert "trainer.precision=bf16-mixed" in tree["settings"], "auto would be another run on another machine"
    names = {}
    for name, entry in tree["points"].items():
        jobs = jobs_of([f"name={name}", *tree["settings"], *entry.get("settings", [])])
        for config in compose_all(jobs):
            for seed in range(entry["seeds"]):
                found = config_hash(config.model_copy(update={"seed": seed}))
                assert names.setdefault(found, config.name) == config.name
            assert str(config.data) == "python_env" and config.model.name == "nano"
    rows = read_csv(path.with_name("results.csv"))
    assert rows and [row for row in rows if names.get(row["config_hash"]) != row["name"]] == []
