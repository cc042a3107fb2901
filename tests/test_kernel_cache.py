"""Compiled kernels come from a folder that nobody else can write to, and a damaged one is made again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qtrain_kernels import cpu, dispatch, kernel_cache
from qtrain_kernels.plans import Rotation


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qtrain" / "kernels"


def test_a_library_is_kept_in_a_private_folder(cache: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"library"

    path = kernel_cache.find_or_make("key", make)
    assert kernel_cache.find_or_make("key", make) == path and made == [1]
    assert path.parent == cache and path.read_bytes() == b"library"
    assert (cache.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert [each.name for each in cache.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", b"libr", b"librarY", b"library\0\0"])
def test_a_damaged_library_is_made_again(cache: Path, damage: bytes) -> None:
    path = kernel_cache.keep("key", b"library")
    path.write_bytes(damage)
    assert kernel_cache.find("key") is None
    assert kernel_cache.find_or_make("key", lambda: b"library").read_bytes() == b"library"


def test_what_another_user_planted_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernel_cache.keep("key", b"library")
    path.chmod(0o666)
    assert kernel_cache.find("key") is None, "anyone could have written it"
    path = kernel_cache.keep("key", b"library")
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)
    assert kernel_cache.find("key") is None, "a link"
    cache.chmod(0o777)
    with pytest.raises(RuntimeError, match="others can write to it"):
        kernel_cache.find("key")
    cache.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        kernel_cache.find("key")


@pytest.mark.parametrize("obstacle", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written_gives_auto_the_reference(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    """As it promises; backend=compiled says why it cannot."""
    if obstacle == "a file":
        (tmp_path / "qtrain").write_text("")
    else:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        monkeypatch.setattr(cpu, "_compiled", lambda source, command: b"library")
    cpu._library.cache_clear()
    cpu._rotate_function.cache_clear()
    dispatch.resolve.cache_clear()
    try:
        assert dispatch.resolve("auto", "cpu") == "reference"
        with pytest.raises(ValueError, match=r"cannot run on cpu: the cache of compiled kernels: .*XDG_CACHE_HOME"):
            dispatch.resolve("compiled", "cpu")
        assert not list(cache.glob(".*")) if cache.is_dir() else True
    finally:
        cpu._library.cache_clear()
        cpu._rotate_function.cache_clear()
        dispatch.resolve.cache_clear()


def test_kernels_of_the_cache_are_the_compilers(cache: Path) -> None:
    cpu._library.cache_clear()
    cpu._rotate_function.cache_clear()
    x = torch.tensor([[[1.0], [2.0]]])
    try:
        first = cpu.rotate(x, Rotation(2))
        (path,) = cache.glob("*.so")
        library = path.read_bytes()
        path.unlink()  # this process has mapped it
        path.write_bytes(library[:-64])  # one that was cut ended the process at each start
        cpu._library.cache_clear()
        cpu._rotate_function.cache_clear()
        assert torch.equal(cpu.rotate(x, Rotation(2)), first)
    finally:
        cpu._library.cache_clear()
        cpu._rotate_function.cache_clear()
