"""Writes the seed corpus: `python -m tests.fuzz.seeds`. Run again when the format or the configuration grows.

Does not belong here: inputs that once broke something; those lie in the corpus under names of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from storage_backends.format import BLOCK, ExtentHeader, SlotHeader
from storage_backends.local.residency import MAGIC, RECORD_BYTES, VERSION, Kind, Record
from tests.fuzz.mutate import CORPUS
from tests.fuzz.targets import RAGGED, SEAL, SLOT
from tests.pages import chain, namespace

_SPACE = namespace((8192, 100))


def _trimmed(raw: bytes) -> bytes:
    """Without the zeroes at the end, which the target puts back."""
    return raw.rstrip(b"\0")


def _slot(lengths: tuple[int, ...], chunks: int, size: int = BLOCK, **fields: object) -> bytes:
    raw = bytearray(size)
    key, parent = chain("a", 2)
    crcs = np.arange(chunks, dtype=np.uint32)
    SlotHeader(_SPACE.digest, key, parent, 5, 6, lengths, crcs, **fields).encode_into(memoryview(raw))  # type: ignore[arg-type]
    return bytes(raw)


def headers() -> dict[str, bytes]:
    extent = ExtentHeader(1, 3 * BLOCK, 31 * BLOCK, 10, 4, _SPACE.digest, 7, _SPACE.description).encode()
    plain = _slot((8192, 100), 2)
    full = _slot((70000,) * 3, 6, pool="mamba", salt="tenant", lora="adapter", event_hash=-3, parent_event_hash=9)
    tokens = _slot((4096,), 1, 2 * BLOCK, tokens=np.arange(1500, dtype=np.uint32))
    slot, sealed = bytes([SLOT]), bytes([SLOT | SEAL])
    return {
        "extent": b"\0" + _trimmed(extent),
        "extent-sealed": bytes([SEAL]) + _trimmed(extent),
        "extent-short": bytes([RAGGED]) + extent[:100],
        "slot": slot + _trimmed(plain),
        "slot-sealed": sealed + _trimmed(plain),
        "slot-all-fields": sealed + _trimmed(full),
        "slot-two-blocks": sealed + _trimmed(tokens),
        "slot-with-payload": sealed + _slot((100, 50), 2) + bytes(range(150)),
        "slot-short": bytes([SLOT | RAGGED]) + plain[:200],
        "empty": b"\1",
    }


def log() -> dict[str, bytes]:
    head = MAGIC + VERSION.to_bytes(4, "little") + RECORD_BYTES.to_bytes(4, "little") + bytes(16 + 96)
    keys = chain("a", 4)
    parents = [bytes(32), *keys]
    stored = [Record(Kind.STORED, 0, i, 10 + i, 20 + i, _SPACE.digest, keys[i], parents[i]) for i in range(4)]
    removed = Record(Kind.REMOVED, 0, 1, 11, 30, _SPACE.digest, keys[1])
    moved = stored[2]._replace(extent=1, slot=0)
    gone = Record(Kind.EXTENT_GONE, 0, time_ns=40)

    def written(*records: Record) -> bytes:
        return head + b"".join(record.encode() for record in records)

    return {
        "empty": b"\0\0" + head,
        "stored": b"\0\x80" + written(*stored),
        "all-kinds": b"\0\x60" + written(*stored, removed, moved, gone),
        "all-kinds-sealed": bytes([SEAL, 0xC0]) + written(*stored, removed, moved, gone, *stored),
        "torn": b"\0\xf0" + written(*stored)[:-50],
        "other-version": b"\0\xff" + MAGIC + b"\2" + head[9:],
        "no-head": b"\0\x40" + b"".join(record.encode() for record in stored),
    }


def config() -> dict[str, bytes]:
    values = {
        "tiers": [
            {"type": "local", "name": "disk", "path": "/tmp/tier", "capacity": "4MiB", "engine": "threads"},
            {"type": "memory", "capacity": 1048576},
        ],
        "model": {"path": "/models/a", "revision": "r1"},
        "salt": "tenant",
        "prefetch_threshold": 256,
    }
    lines = (
        "# comment\ntiers:\n  - type: local\n    path: /tmp/tier\n    capacity: 4MiB\n    engine: auto\n"
        "  - {type: memory, capacity: 1GiB, name: m}\nmodel:\n  revision: r1\nsalt: tenant\nprefetch_threshold: 256\n"
    )
    toml = '[[tiers]]\ntype = "memory"\ncapacity = "1GiB"\n[model]\nrevision = "r"\n'
    return {
        "yaml": b"\0" + lines.encode(),
        "yaml-anchors": b"\0" + b"tiers:\n- &a {type: memory, capacity: 1MB}\n- <<: *a\n  name: other\n",
        "yaml-errors": b"\0" + b"tiers: [{type: floppy}, {type: memory, capacity: 1XB, odd: 1}]\nodd: 2\n",
        "yaml-own-class": b"\0" + b"tiers: [{type: 'storage_backends.memory:MemoryBackend', capacity: 2MB}]\n",
        "json": b"\1" + json.dumps(values).encode(),
        "json-empty": b"\1{}",
        "toml": b"\2" + toml.encode(),
    }


def main() -> None:
    for target, made in {"headers": headers(), "log": log(), "config": config()}.items():
        folder: Path = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            (folder / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
