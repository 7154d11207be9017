"""Local tiers for tests: opened as often as a test likes, all closed at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage_backends.base import Dispatcher
from storage_backends.local import LocalBackend

Open = Callable[..., LocalBackend]


@contextlib.contextmanager
def local_tiers(path: Path, engine: str) -> Iterator[Open]:
    """Gives `open(**options)`: a LocalBackend in `path`, of 64 MiB, with `engine`; options say otherwise."""
    with tiers(path=path, capacity=64 << 20, engine=engine) as open_one:
        yield open_one


@contextlib.contextmanager
def tiers(**usual: Any) -> Iterator[Open]:
    """Gives `open(*paths, **options)`: a LocalBackend in these paths, with the usual options; options say otherwise."""
    dispatcher = Dispatcher()
    opened: list[LocalBackend] = []

    def open_one(*paths: Path, **options: Any) -> LocalBackend:
        values = {**usual, **({"path": list(paths)} if paths else {}), **options}
        opened.append(LocalBackend(LocalBackend.Options.model_validate(values), dispatcher))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()
    dispatcher.close()
