"""Settings of all kinds, as train.py gets them, up to the plan of a dry run: each is taken, or answered by a sentence.
Slow: run with -m slow.

What fails is shrunk by hypothesis and printed as a command that does it again.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import BaseModel

from qtrain.config import Config
from qtrain.config.settings import classes_of, configs_dir, group_names
from qtrain.errors import UserError, explain
from qtrain.train import compose
from qtrain.training.session import run

PARTS, EXAMPLES = 50, 100
SECONDS = 60  # for one, on a busy machine
# Beside what is drawn: a small model and one micro-batch, since the plan of memory follows a step of it.
BASE = (
    "dry_run=true", "model.n_layers=1", "model.dim=128", "model.ffn_dim=128", "model.seq_len=64", "recipe=bf16",
    "trainer.batch_tokens=512",
)  # fmt: skip


def _leaves(kind: type[BaseModel], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the schema, those of all members of families among them, and its type."""
    for name, field in kind.model_fields.items():
        yield f"{at}{name}", field.annotation
        for each in classes_of(kind, name):
            if each is not kind and at.count(".") < 3:
                yield from _leaves(each, f"{at}{name}.")


KEYS = dict(_leaves(Config))
GROUPS = sorted(path.name for path in configs_dir().iterdir() if path.is_dir())
WORDS_OF = {key: {word for word in get_args(kind) if isinstance(word, str)} for key, kind in KEYS.items()}
WORDS = sorted(set.union(*WORDS_OF.values()))
ODD = (
    "", "null", "true", "False", "nan", "inf", "-inf", "1e400", "-0.0", "0", "1e-320", "0x10", "1_000", "1e5", "'", '"',
    "''", "[]", "{}", "[[[]]]", "[1,2]", "[a,'b c']", "{a:1}", "{a:{b:[nan]}}", "{'*.q':quest}", "???", "${seed}",
    "${nope}", "${model.dim}", "${div:1,0}", "${", "a,b", "1,2", "range(1,3)", "choice(1,2)", "glob(*)", "\\", "9" * 30,
    "9" * 5000, "[" * 3000, "~", "/", "..", "a=b", "=", "é", "日本", "\u202e", "\x1b[31m", "a b", "-", "--help", "1.5",
    "quest", "mxfp4", "int4/row/float32", "hadamard32", "e2m1/32/e8m0",
)  # fmt: skip


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


numbers = st.one_of(
    st.integers(0, 8),
    st.integers(-(2**70), 2**70),
    st.integers(0, 24).map(lambda n: 2**n),
    st.floats(),
    st.floats(0, 1),
)
values = st.one_of(
    numbers.map(str),
    st.sampled_from(ODD),
    st.sampled_from(WORDS),
    st.text(max_size=12),
    st.text(max_size=12).map(quoted),
    st.lists(numbers.map(str), max_size=3).map(lambda found: f"[{','.join(found)}]"),
    st.dictionaries(st.sampled_from(["a", "name", "format", "*.q"]), numbers.map(str), max_size=2).map(
        lambda found: "{" + ",".join(f"{quoted(key)}:{value}" for key, value in found.items()) + "}"
    ),
)


def plausible(key: str) -> st.SearchStrategy[str]:
    """Values of the kind that a key takes, if not always in its range."""
    kinds = {KEYS[key], *get_args(KEYS[key])}
    found: list[st.SearchStrategy[str]] = [st.sampled_from(sorted(each)) for each in [WORDS_OF[key]] if each]
    found += [st.sampled_from(["true", "false"])] if bool in kinds else []
    found += [st.integers(0, 12).map(lambda n: str(2**n)), st.integers(1, 9).map(str)] if int in kinds else []
    found += [st.floats(0, 1).map(str)] if float in kinds else []
    found += [st.just("null")] if type(None) in kinds else []
    return st.one_of(found) if found else values


keys = st.sampled_from(sorted(KEYS))
settings = st.tuples(
    st.sampled_from(["", "", "", "+", "++"]),
    keys.flatmap(lambda key: st.tuples(st.just(key), st.one_of(plausible(key), values))),
).map(lambda found: (found[0], *found[1]))
groups = st.sampled_from(GROUPS).flatmap(
    lambda group: st.tuples(
        st.sampled_from(["", "", "+"]), st.just(group), st.one_of(st.sampled_from(group_names(group) or ["x"]), values)
    )
)
overrides = st.one_of(settings, settings, settings, groups).map(lambda found: f"{found[0]}{found[1]}={found[2]}")
deletions = st.sampled_from([*GROUPS, *sorted(KEYS)]).map(lambda key: f"~{key}")
commands = st.lists(st.one_of(*[overrides] * 12, deletions), min_size=1, max_size=3)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds; what pytest-timeout has set goes on afterwards."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001) if left else 0, interval)


def answer(command: list[str]) -> str:
    """`taken`, or `refused` with a sentence. Any other error is handed on."""
    try:
        with limited(SECONDS):
            run(compose([*BASE, *command]))
    except UserError as error:
        told = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        told = str(explain(error))
    else:
        return "taken"
    assert 15 < len(told) < 8_000, f"the answer has {len(told)} characters: {told[:500]}"
    assert "Traceback" not in told and " " in told.strip(), told
    return "refused"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_overrides_are_taken_or_answered_by_a_sentence(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    counted: Counter[str] = Counter()

    @hypothesis.seed(part)
    @hypothesis.settings(
        max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(commands)
    def examples(command: list[str]) -> None:
        hypothesis.note("python train.py " + shlex.join([*BASE, *command]))
        counted[answer(command)] += 1
        capsys.readouterr()

    examples()
    with capsys.disabled():
        print(f"part {part}: {dict(counted)}")
    assert counted.total() >= EXAMPLES / 2
    assert counted["taken"] >= EXAMPLES / 50 and counted["refused"] >= EXAMPLES / 4
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing"
