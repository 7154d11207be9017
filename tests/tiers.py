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
    dispatcher = Dispatcher()
    opened: list[LocalBackend] = []

    def open_one(**options: Any) -> LocalBackend:
        values = {"path": path, "capacity": 64 << 20, "engine": engine, **options}
        opened.append(LocalBackend(LocalBackend.Options.model_validate(values), dispatcher))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()
    dispatcher.close()
