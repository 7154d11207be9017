"""What the scenarios share: an attached controller, its logged lines, the state of weights, a spy on the store."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rig

from hicache_ext.sglang import versions, weights

TOKENS = list(range(100, 100 + 20 * rig.PAGE))
ROOT = Path(tempfile.mkdtemp(prefix="hicache-sglang-"))
LAYOUTS = [
    (layout, mla)
    for mla in (False, True)
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
    if not (mla and layout == "page_head")
]


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def count(self, part: str) -> int:
        return sum(part in line for line in self.lines)


@contextlib.contextmanager
def logged() -> Iterator[Lines]:
    lines = Lines()
    logging.getLogger("hicache_ext").addHandler(lines)
    try:
        yield lines
    finally:
        logging.getLogger("hicache_ext").removeHandler(lines)


@contextlib.contextmanager
def attached(name: str = "hicache_ext", extra: dict[str, Any] | None = None, **options: Any) -> Iterator[rig.Rig]:
    """A controller with our backend; `name` dynamic takes the stock route."""
    config = extra or rig.shared_tier()
    config = rig.dynamic(config) if name == "dynamic" else config
    if name == "dynamic" and not hashes_late() and not plugged():
        # 0.5.17 can be attached at run time with the plugin only.
        options |= {"storage_backend": name, "storage_backend_extra_config": config}
    found = rig.Rig(**options)
    if found.controller.storage_backend is None:
        found.attach(name, config)
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def changed(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def version() -> tuple[int, ...]:
    return versions.check(versions.installed())


def plugged() -> bool:
    from hicache_ext.sglang import plugin

    return plugin._state.registered


def hashes_late() -> bool:
    """Whether this SGLang hashes what is cached already when storage is attached."""
    return version() > (0, 5, 17)


def refused(call: Callable[[], Any]) -> str:
    """The one line with which this fails."""
    try:
        call()
    except Exception as error:
        line = str(error)
        assert "\n" not in line, line
        return line
    raise AssertionError("was not refused")


def spy(adapter: Any, name: str) -> list[Any]:
    """The batches that reach this method of the adapter's store."""
    seen: list[Any] = []
    original = getattr(adapter.store, name)

    def watched(batch: Any, *args: Any) -> Any:
        seen.append(batch)
        return original(batch, *args)

    setattr(adapter.store, name, watched)
    return seen


def is_zero_copy(found: rig.Rig) -> bool:
    controller = found.controller
    return (
        controller.page_get_func.__name__ == "_page_get_zero_copy"
        and controller.page_set_func.__name__ == "_page_set_zero_copy"
        and found.adapter.details()["pools"]["kv"] == "addresses"
    )


def round_trip(found: rig.Rig, tokens: list[int] = TOKENS, seed: int = 1, **key: Any) -> None:
    """What is written comes back, byte for byte."""
    sequence = found.key(tokens, **key)
    content, hashes = found.backup(sequence, seed)
    assert len(hashes) == len(tokens) // rig.PAGE
    arrived = found.prefetch(sequence)
    assert arrived == content, (len(arrived), len(content), found.adapter.details())


def current(found: rig.Rig) -> Any:
    """The KV pool's namespace at this moment; None while the adapter is frozen."""
    return found.adapter._namespace(found.adapter._pools["kv"])


def fresh_weights() -> None:
    """As in a process whose weights were never updated."""
    weights.STATE = weights.WeightState()
    weights._started_from.clear()
