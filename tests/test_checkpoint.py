"""Checkpoints: written whole or not at all, checked before they are trusted, loaded without unpickling code."""

from __future__ import annotations

import pytest
import torch

from qtrain.checkpoint import (
    AtomicCheckpointIO,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune,
    tidy,
)
from qtrain.errors import UserError


def save(directory, step):
    path = checkpoint_path(directory, step)
    AtomicCheckpointIO().save_checkpoint({"step": step, "state_dict": {"w": torch.full((1000,), float(step))}}, path)
    return path


def test_round_trip(tmp_path):
    path = save(tmp_path, 3)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3 and torch.equal(loaded["state_dict"]["w"], torch.full((1000,), 3.0))


def test_a_kill_while_writing_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    old = save(tmp_path, 4)

    def half_then_die(obj, file):
        file.write(b"PK\x03\x04 half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_then_die)
    for step in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, step)
    assert newest_checkpoint(tmp_path) == (4, old)
    assert load_checkpoint(old)["step"] == 4
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [old.name], "the partial files are cleared away"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(tmp_path, caplog, damage):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    content = bytearray(bad.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    else:
        content[content.index(torch.full((4,), 20.0).numpy().tobytes())] ^= 1
    bad.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(bad)
    assert newest_checkpoint(tmp_path) == (10, good)
    assert bad.exists(), "to look is not to touch: another process may be writing there"
    tidy(tmp_path)
    assert newest_checkpoint(tmp_path) == (10, good)
    assert "damaged" in caplog.text and bad.name in caplog.text
    assert bad.with_suffix(".ckpt.damaged").exists(), "nothing already written is lost"


def test_no_damage_passes_for_good_or_raises(tmp_path):
    """Bits flipped anywhere in the file: found, or the content still loads as it was written."""
    path = save(tmp_path, 7)
    whole = path.read_bytes()
    for position in range(0, 8 * len(whole), 8 * len(whole) // 400 + 3):
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        if newest_checkpoint(tmp_path) is not None:
            loaded = load_checkpoint(path)
            assert loaded["step"] == 7 and torch.equal(loaded["state_dict"]["w"], torch.full((1000,), 7.0))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    path = checkpoint_path(tmp_path, 1)
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(UserError, match="UnpicklingError"):
        load_checkpoint(path)


def test_prune_keeps_the_newest(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, step)
    prune(tmp_path, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 100]
    assert newest_checkpoint(tmp_path / "nothing") is None
