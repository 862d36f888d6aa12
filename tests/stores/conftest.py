"""A cache of one's own, and a store in memory that counts and can fail."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rlt_jax import stores

OPERATIONS = (
    "cat_file",
    "pipe_file",
    "put_file",
    "get_file",
    "rm_file",
    "info",
    "find",
)


class Memory:
    """The store behind memory:// URLs.

    Attributes:
      calls: names of the operations and their paths, since the last `clear`.
      before: called with the name and the arguments of every operation; it may raise.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[..., None] = lambda name, *args: None

    @property
    def objects(self) -> dict[str, bytes]:
        """Path -> content of everything in the store."""
        return {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}

    def put(self, path: str, content: bytes) -> None:
        MemoryFileSystem(use_listings_cache=False).pipe(path, content)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = Memory()

    def watched(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def operation(self: MemoryFileSystem, *args: Any, **options: Any) -> Any:
            memory.calls.append((name, str(args[-1 if name == "put_file" else 0])))
            memory.before(name, *args)
            return act(self, *args, **options)

        return operation

    MemoryFileSystem.store.clear()
    for name in OPERATIONS:
        act = watched(name, getattr(MemoryFileSystem, name))
        monkeypatch.setattr(MemoryFileSystem, name, act)
    yield memory
    MemoryFileSystem.store.clear()


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Changes to the cache of another host; returns its folder."""

    def change(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        stores.local.cache_clear()
        return tmp_path / name

    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    change("host")
    return change
