"""Tables of runs: what is read, and that nothing bad is used in silence."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from qtrain.errors import UserError
from qtrain.scaling.runs import read_table, runs_of

GOOD = {"recipe": "bf16", "seed": 0, "non_embedding_parameters": 1000, "tokens": 20000, "val_loss": 3.5}


def test_a_row_becomes_a_run(tmp_path):
    row = GOOD | {"forward": "quest", "backward": "bf16", "exponent_bits": 2, "mantissa_bits": 1, "block_size": 32}
    (run,), left_out = runs_of([row], "here")
    assert (run.recipe, run.seed, run.N, run.D, run.loss) == ("bf16", "0", 1000.0, 20000.0, 3.5)
    assert (run.forward, run.backward, run.precision, left_out) == ("quest", "bf16", (2.0, 1.0, 32.0), [])
    assert runs_of([GOOD], "here")[0][0].precision is None


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_both_kinds_give_the_same_runs(tmp_path, suffix):
    rows = [GOOD, GOOD | {"recipe": "quest", "val_loss": 3.75}]
    path = tmp_path / f"results.{suffix}"
    if suffix == "csv":
        lines = ["# where it comes from", ",".join(GOOD), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert runs_of(read_table(path), "here") == runs_of(rows[::-1], "here")


@pytest.mark.parametrize(("second", "message"), [
    ({"data_hash": "b"}, r"the runs in here are of 2 different corpora \(a, b\); fit them apart"),
    ({"data_hash": ""}, r"the runs in here are of 2 different corpora \(a, unnamed\)"),
    ({"forward": "quest", "backward": "sr"}, "here: 1 of 2 runs say what forward and backward run in; let all or none"),
    ({"tokenizer": "bpe"}, r"the runs in here are of 2 different tokenizers \(bpe, bytes\)"),
    ({"seed": 0}, "here has several runs of recipe 'bf16', N 1000, D 20000, seed 0"),
    ({"tokens": 0}, "here, row 3: tokens is 0, not a positive number"),
    ({"tokens": "many"}, "here, row 3: tokens is 'many', not a number"),
    ({"non_embedding_parameters": ""}, "here, row 3: non_embedding_parameters is '', not a positive number"),
    ({"val_loss": -1}, r"here, row 3: val_loss is -1\.0; a cross-entropy is above zero"),
    ({"recipe": ""}, "here, row 3 names no recipe"),
    ({"exponent_bits": 2, "mantissa_bits": 1, "block_size": 1}, "here, row 3: block_size is 1; a block has two"),
    ({"exponent_bits": 2, "mantissa_bits": 1, "block_size": "inf"}, "here, row 3: block_size is inf"),
    ({"exponent_bits": 4, "mantissa_bits": 3}, "here, row 3: block_size is empty; give all of exponent_bits"),
    ({"exponent_bits": -4, "mantissa_bits": 3, "block_size": 32}, "here, row 3: -4 exponent and 3 mantissa bits"),
    ({"val_tokens": 9}, r"the runs in here are of 2 different amounts of validation text \(512, 9\)"),
    ({"name": "other"}, "here: of recipe 'bf16' there are runs named other and runs without a name"),
])  # fmt: skip
def test_a_bad_table_is_refused_by_what_is_wrong(second, message):
    first = GOOD | {"data_hash": "a", "tokenizer": "bytes", "val_tokens": 512}
    with pytest.raises(UserError, match=message):
        runs_of([first, first | {"seed": 1} | second], "here")


@pytest.mark.parametrize(("more", "reason"), [
    ({"val_loss": "nan"}, "it has no finite loss (diverged)"),
    ({"val_loss": ""}, "it has no finite loss (diverged)"),
    ({"val_loss": None}, "it has no finite loss (diverged)"),
    ({"val_loss": "inf"}, "it has no finite loss (diverged)"),
    ({"status": "running"}, "its status is running"),
])  # fmt: skip
def test_a_run_that_cannot_be_used_is_named(more, reason):
    runs, left_out = runs_of([GOOD, GOOD | {"seed": 1} | more], "here")
    assert len(runs) == 1
    assert left_out == [f"{'here, row 3' if 'status' in more else 'bf16, N 1000, D 2e+04, seed 1'}: not used, {reason}"]


def test_rows_of_begun_runs_are_named_and_need_no_numbers() -> None:
    """As the report's table of all runs has them."""
    begun = dict.fromkeys(GOOD) | {"status": "running", "directory": "runs/x", "data_hash": None}
    runs, left_out = runs_of([GOOD | {"data_hash": "a"}, begun], "here")
    assert len(runs) == 1 and left_out == ["runs/x: not used, its status is running"]
    with pytest.raises(UserError, match="here holds 1 runs, none of them finished"):
        runs_of([begun], "here")


def test_an_empty_place_is_refused():
    with pytest.raises(UserError, match="here holds no run: there is nothing to fit"):
        runs_of([], "here")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", b"recipe,tokens,val_loss\nbf16,1,2\n", r"a\.csv lacks non_embedding_parameters"),
    ("a.csv", b"\xff\xfe\x00", r"cannot read .*a\.csv"),
    ("a.parquet", b"no parquet", r"cannot read .*a\.parquet"),
    ("b.csv", None, r"cannot read .*b\.csv"),
])  # fmt: skip
def test_a_file_that_is_no_table_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name)


def test_runs_of_several_names_under_one_recipe_are_told_apart_by_name() -> None:
    def row(name: str, recipe: str, seed: int) -> dict[str, object]:
        return {"name": name, "recipe": recipe, "seed": seed, "non_embedding_parameters": 1e6, "tokens": 1e7,
                "val_loss": 2.0}  # fmt: skip

    rows = [row("quest", "quest", 0), row("quest_2bit", "quest", 0), row("ladder", "bf16", 0), row("ladder", "bf16", 1)]
    runs, left_out = runs_of(rows, "t.csv")
    assert [run.recipe for run in runs] == ["bf16", "bf16", "quest", "quest_2bit"] and not left_out


def test_names_that_hold_runs_of_several_recipes_are_no_recipes() -> None:
    """Two sweeps, each with its name, of the same recipes."""
    rows = [
        GOOD | {"name": name, "recipe": recipe, "non_embedding_parameters": size}
        for name, size in (("small", 1000), ("large", 4000)) for recipe in ("bf16", "quest")
    ]  # fmt: skip
    assert [run.recipe for run in runs_of(rows, "here")[0]] == ["bf16", "bf16", "quest", "quest"]
