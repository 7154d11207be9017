"""The messages of a KV event stream, as SGLang and vLLM write them and Dynamo, llm-d and others read them.

Belongs here: the messages, their bytes, and reading other engines' bytes. Does not belong here: sockets, order,
residency.

    frames:   topic | sequence number, 8 bytes, big-endian | payload
    payload:  msgpack [seconds since 1970, [event, ...], data-parallel rank or nil]: exactly three items
    event:    msgpack map, "type" first: BlockStored, BlockRemoved or AllBlocksCleared; optional fields only where set

`Dialect.SGLANG` gives SGLang's bytes (0.5.21 to 0.5.23), `Dialect.VLLM` vLLM's (0.3x), in which `medium` and
`lora_name` are always there, some fields are more and their order is another one; a field of one name means the same in
both. SGLang 0.5.17 writes events as arrays, [type, field, ...]: read here, not written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

SEQUENCE_BYTES = 8
#: Ends the answer to a replay request.
END_OF_REPLAY = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)


class Medium(StrEnum):
    """Where a copy lies, by the names that SGLang gives its media. Routers rank them in this order."""

    DEVICE = "GPU"
    HOST = "CPU_PINNED"
    DISK = "DISK"
    EXTERNAL = "EXTERNAL"

    @classmethod
    def of(cls, name: str | None) -> Medium | None:
        """The medium that a router takes `name` for: no name is the device. None: it drops the event in silence."""
        return cls.DEVICE if name is None else _NAMES.get(name)


_NAMES = {
    "GPU": Medium.DEVICE,
    **dict.fromkeys(("CPU", "CPU_PINNED", "CPU_TIER1"), Medium.HOST),
    **dict.fromkeys(("DISK", "NVME", "STORAGE", "CPU_TIER2"), Medium.DISK),
    **dict.fromkeys(("EXTERNAL", "NETWORK", "REMOTE", "SHARED"), Medium.EXTERNAL),
}


class Dialect(StrEnum):
    """Whose bytes to write."""

    SGLANG = "sglang"
    VLLM = "vllm"


class LoadCost(msgspec.Struct, gc=False, frozen=True):
    """What loading from this medium costs here, as measured: so many bytes a second after so many seconds."""

    bytes_per_s: float
    latency_s: float


class Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Base of the three events."""


class BlockStored(Event):
    """A chain of blocks has a copy in a medium.

    block_hashes: int64, in the order of the chain, none twice. parent_block_hash: of the first one; None where it
    begins a prompt. token_ids: block_size for each block. cache_salt, session_id, lora_name: for attribution, the
    hashes tell them apart already. extra_keys and what follows: vLLM's alone; `locality` is LOCAL or REMOTE,
    `ownership` names the tier that holds the copy.
    """

    # With the tag these are 15 fields. msgspec writes the header of a map by how many fields there can be, and one more
    # would make it another than SGLang's and vLLM's.
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None
    ownership: str | None = None


class CostedBlockStored(BlockStored, tag="BlockStored"):
    """With a field that is ours, and that all known readers pass over: a store's `load_cost`."""

    load_cost: LoadCost | None = None


class BlockRemoved(Event):
    """Blocks whose last copy in a medium is gone. Without a medium readers take the device's."""

    block_hashes: list[int]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(Event):
    """Nothing is left in any medium of this data-parallel rank."""


AnyEvent = BlockStored | BlockRemoved | AllBlocksCleared


def name_of(event: AnyEvent) -> str:
    """The event's `type` on the wire."""
    return str(event.__struct_config__.tag)


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """What one message carries. ts: seconds since 1970."""

    ts: float
    events: list[AnyEvent]
    dp_rank: int | None = None


class _VllmStored(Event, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: None = None  # never set
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class _CostedVllmStored(_VllmStored, tag="BlockStored"):
    load_cost: LoadCost | None = None


class _VllmRemoved(Event, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


_VLLM_STORED = tuple(name for name in _VllmStored.__struct_fields__ if name in BlockStored.__struct_fields__)
_VLLM_REMOVED = _VllmRemoved.__struct_fields__


class _CostedBatch(EventBatch, array_like=True):
    events: list[CostedBlockStored | BlockRemoved | AllBlocksCleared]  # type: ignore[assignment]


_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(EventBatch)
_costed = msgspec.msgpack.Decoder(_CostedBatch)
_anything = msgspec.msgpack.Decoder()


def encode(batch: EventBatch, dialect: Dialect = Dialect.SGLANG) -> bytes:
    """The payload of one message. vLLM's has no field for a salt."""
    if dialect is Dialect.SGLANG:
        return _encoder.encode(batch)
    return _encoder.encode((batch.ts, list(map(_as_vllm, batch.events)), batch.dp_rank))


def _as_vllm(event: AnyEvent) -> Event:
    if isinstance(event, BlockStored):
        fields = {name: getattr(event, name) for name in _VLLM_STORED}
        if isinstance(event, CostedBlockStored):
            return _CostedVllmStored(**fields, load_cost=event.load_cost)
        return _VllmStored(**fields)
    if isinstance(event, BlockRemoved):
        return _VllmRemoved(**{name: getattr(event, name) for name in _VLLM_REMOVED})
    return event


# -- reading ---------------------------------------------------------------------------------------------------------

#: Fields of events that are written as arrays, up to where the engines' orders part.
_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
_REMOVED = ("block_hashes", "medium")
_KINDS: dict[str, tuple[type[AnyEvent], tuple[str, ...]]] = {
    "BlockStored": (BlockStored, _STORED),
    "BlockRemoved": (BlockRemoved, _REMOVED),
    "AllBlocksCleared": (AllBlocksCleared, ()),
}
_THREE_ITEMS = b"\x93"  # a msgpack array; msgspec would take any number of items
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)  # bad UTF-8 is a ValueError
_LOW_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Decoded:
    """One payload as read. problems: what a strict reader would drop the whole batch for; `batch` holds the rest."""

    batch: EventBatch
    problems: tuple[str, ...] = ()


def decode(payload: bytes) -> Decoded:
    """Read any engine's payload: events as maps or arrays, fields that we do not know, hashes as bytes.

    Never raises for what it is given: bytes that are no payload at all come back as an empty batch with its problem.
    """
    if payload[:1] == _THREE_ITEMS:
        try:
            if b"load_cost" in payload:
                read = _costed.decode(payload)
                return Decoded(EventBatch(read.ts, list(map(_plain, read.events)), read.dp_rank))
            return Decoded(_batches.decode(payload))
        except _UNREADABLE:
            pass
    try:
        found = _anything.decode(payload)
    except _UNREADABLE as error:
        return Decoded(EventBatch(0.0, []), (f"not msgpack: {error}",))
    if isinstance(found, dict):  # some vLLM versions
        found = [found.get("ts"), found.get("events"), found.get("data_parallel_rank")]
    if not isinstance(found, list) or len(found) < 2 or not isinstance(found[1], list):
        return Decoded(EventBatch(0.0, []), ("not [ts, events, rank]",))
    problems: list[str] = [] if len(found) == 3 else [f"a batch of {len(found)} items; readers want 3"]
    ts, rank = found[0], found[2] if len(found) > 2 else None
    if not isinstance(ts, int | float) or isinstance(ts, bool):
        problems.append(f"ts is {ts!r}")
        ts = 0.0
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
        problems.append(f"rank is {rank!r}")
        rank = None
    return Decoded(EventBatch(float(ts), list(_events(found[1], problems)), rank), tuple(problems))


def _plain(event: AnyEvent) -> AnyEvent:
    """A store that says no cost is of the class that has none."""
    if isinstance(event, CostedBlockStored) and event.load_cost is None:
        return BlockStored(**{name: getattr(event, name) for name in BlockStored.__struct_fields__})
    return event


def _events(found: list[Any], problems: list[str]) -> Iterable[AnyEvent]:
    for at, raw in enumerate(found):
        name, fields = None, {}
        if isinstance(raw, dict):
            name, fields = raw.get("type"), {key: value for key, value in raw.items() if key != "type"}
        elif isinstance(raw, list) and raw:
            name = raw[0]
        kind = _KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            problems.append(f"event {at} is of the unknown type {name!r}")
            continue
        if isinstance(raw, list):
            fields = dict(zip(kind[1], raw[1:], strict=False))
        problems.extend(f"event {at}: {problem}" for problem in _as_numbers(fields))
        try:
            yield msgspec.convert({"type": name, **fields}, kind[0])
        except (*_UNREADABLE, TypeError) as error:
            problems.append(f"event {at} ({name}): {error}")


def _as_numbers(fields: dict[str, Any]) -> Iterable[str]:
    """Hashes given as bytes become their low 64 bits, which is what vLLM makes of them where it gives numbers."""
    hashes, parent = fields.get("block_hashes"), fields.get("parent_block_hash")
    if isinstance(hashes, list) and any(isinstance(value, bytes) for value in hashes):
        fields["block_hashes"] = [_number(value) for value in hashes]
        yield "hashes as bytes"
    if isinstance(parent, bytes):
        fields["parent_block_hash"] = _number(parent)
        yield "parent hash as bytes"


def _number(value: Any) -> Any:
    return int.from_bytes(value, "big") & _LOW_64 if isinstance(value, bytes) else value
