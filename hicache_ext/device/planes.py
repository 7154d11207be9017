"""A pool as planes: which bytes are a page, where they lie in a slot, and which layer waits for them.

Belongs here: addresses of what is copied. Does not belong here: how an engine's pools become this (adapters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Plane:
    """One buffer of a pool, and where its part of a page lies: `tokens x heads` runs of `run` bytes.

    buffer: the device tensor, which begins with page 0. page, token, head: strides in it, in bytes. at, slot_token,
    slot_head: in a slot. layer: of the forward, the first that reads this buffer.
    """

    buffer: Any
    layer: int
    tokens: int
    heads: int
    run: int
    page: int
    token: int
    head: int
    at: int
    slot_token: int
    slot_head: int


class Pool(Protocol):
    """planes: of one pool, by layer. pages: page numbers are below this."""

    @property
    def planes(self) -> Sequence[Plane]: ...

    @property
    def pages(self) -> int: ...


class Slots(Protocol):
    """Page slots, `stride` bytes apart from `address` on."""

    @property
    def slots(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def address(self) -> int: ...


class HostSlots(Slots, Protocol):
    """In host memory. view: all of it, as a buffer."""

    @property
    def view(self) -> Any: ...
