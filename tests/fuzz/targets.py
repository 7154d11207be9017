"""The fuzz targets: functions of bytes that return, or raise for a bug.

Belongs here: how an input becomes a call, and what must hold whatever the input is. Does not belong here: where inputs
come from (mutate.py, seeds.py, run.py).
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import logging
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.config import Config, ConfigError
from storage_backends import registry
from storage_backends.checksum import crc32c
from storage_backends.format import BLOCK, ExtentHeader, FormatError, SlotHeader, UnknownVersion
from storage_backends.local.residency import RECORD_BYTES, LogReader, Record
from storage_backends.local.scrub import judge
from storage_backends.local.survey import LogView, describe

# First byte of an input for `headers`: what the rest is.
SLOT, SEAL, RAGGED = 1, 2, 4
# First byte of an input for `log`: SEAL as above; the second byte says where the log was cut when first read.
SUFFIXES = (".yaml", ".json", ".toml")

_EXTENT_CRC, _SLOT_CRC = 76, 140


def headers(data: bytes) -> None:
    """A slot's or extent's header, with its checksum put right where SEAL asks: wild numbers that look trustworthy."""
    if not data:
        return
    flags, raw = data[0], bytearray(data[1:])
    if not flags & RAGGED:
        raw.extend(bytes(-len(raw) % BLOCK or (0 if raw else BLOCK)))
    if flags & SEAL and len(raw) >= BLOCK:
        _seal(raw, flags & SLOT)
    (_slot if flags & SLOT else _extent)(bytes(raw))


def _seal(raw: bytearray, slot: int) -> None:
    at, size = _EXTENT_CRC, BLOCK
    if slot:
        at, size = _SLOT_CRC, int.from_bytes(raw[12:16], "little")
    raw[at : at + 4] = bytes(4)
    raw[at : at + 4] = crc32c(bytes(raw[:size])).to_bytes(4, "little")


def _slot(raw: bytes) -> None:
    memory = np.frombuffer(raw or b"\0", np.uint8).copy()
    try:
        header = SlotHeader.decode(raw)
    except FormatError:
        header = None
    # What the scrub makes of it must not reach outside the bytes that are there.
    extent = ExtentHeader(0, len(raw), BLOCK + len(raw), 1, 0, header.namespace if header else bytes(16), 0)
    view = memoryview(memory)[: len(raw)]
    judge(view, memory.ctypes.data, extent, None)
    if header is None:
        return
    assert len(header.crcs) * 4 + len(header.lengths) * 8 <= len(raw), "more contents than bytes"
    again = bytearray(int.from_bytes(raw[12:16], "little"))
    dataclasses.replace(header, pool="", salt="", lora="").encode_into(memoryview(again))
    back = SlotHeader.decode(bytes(again))
    for name in ("namespace", "key", "parent", "generation", "time_ns", "lengths", "event_hash", "parent_event_hash"):
        assert getattr(back, name) == getattr(header, name), name
    assert np.array_equal(back.crcs, header.crcs)
    assert (back.tokens is None) == (header.tokens is None)
    assert header.tokens is None or np.array_equal(back.tokens, header.tokens)


def _extent(raw: bytes) -> None:
    try:
        header = ExtentHeader.decode(raw)
    except FormatError:
        return
    assert header.slots == 0 or header.slot_offset(header.slots - 1) + header.slot_bytes <= header.extent_bytes
    assert ExtentHeader.decode(header.encode()) == header
    assert isinstance(describe(header), dict)


def log(data: bytes) -> None:
    """A residency log, read as it was when cut short and again when whole: together what one reading gives."""
    if len(data) < 2:
        return
    flags, cut, raw = data[0], data[1], bytearray(data[2:])
    if flags & SEAL:
        for at in range(RECORD_BYTES, len(raw) - RECORD_BYTES + 1, RECORD_BYTES):
            raw[at : at + 4] = crc32c(bytes(raw[at + 4 : at + RECORD_BYTES])).to_bytes(4, "little")
    logging.disable()  # what the reader thinks of each of a million logs
    try:
        _log(_folder(), bytes(raw), cut)
    finally:
        logging.disable(logging.NOTSET)


def _log(folder: Path, raw: bytes, cut: int) -> None:
    path = folder / "residency.log"
    whole = _read_log(path, [raw])
    assert len(whole) <= len(raw) // RECORD_BYTES
    assert whole == _read_log(path, [raw[: len(raw) * cut // 255], raw]), "growth changes what is read"
    view = LogView(folder)
    try:
        view.refresh()
    except UnknownVersion:
        return
    finally:
        view.close()
    named = [(record.namespace, record.key) for slots in view.pages.values() for record in slots.values()]
    assert len(named) == len(set(named)), "a page in two places"


def _read_log(path: Path, versions: list[bytes]) -> list[Record]:
    """Records of a log that grows from one version to the next."""
    records: list[Record] = []
    reader = LogReader(path)
    try:
        for content in versions:
            path.write_bytes(content)
            try:
                records += reader.read()
            except UnknownVersion:
                return []
        assert list(reader.read()) == [], "records twice"
    finally:
        reader.close()
    return records


def config(data: bytes) -> None:
    """A configuration file: a Config, or ConfigError with one line and one fix per problem."""
    if not data:
        return
    file = _folder() / ("config" + SUFFIXES[data[0] % len(SUFFIXES)])
    file.write_bytes(data[1:])
    said = ""
    registry.importlib = _GuardedImports  # type: ignore[attr-defined]
    try:
        Config.load(file)
    except ConfigError as error:
        said = str(error)
    finally:
        registry.importlib = importlib  # type: ignore[attr-defined]
    assert len(said) < 20_000, "an error that nobody can read"
    assert not said or all("Fix: " in line for line in said.split("\n")), said


@cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    made = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None, prefix="hicache-fuzz-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


class _GuardedImports:
    """Stands in for importlib: a backend may be named after any module, and most do something."""

    @staticmethod
    def import_module(name: str) -> Any:
        known = name in sys.modules or name.startswith("storage_backends.")
        if known or not all(part.isidentifier() for part in name.split(".")):
            return importlib.import_module(name)
        raise ModuleNotFoundError(f"No module named {name!r}")


TARGETS: dict[str, Callable[[bytes], None]] = {"headers": headers, "log": log, "config": config}

#: Pieces that a mutator may put anywhere, beside random bytes.
TOKENS: dict[str, tuple[bytes, ...]] = {
    "headers": (
        *(struct.pack("<Q", number) for number in (0, 1, 4096, 65536, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)),
        *(struct.pack("<I", number) for number in (8192, 0x7FFFFFFF, 0xFFFFFFFF)),
        b"HICSLOT1", b"HICEXT01", b"[" * 900, b'{"layout":{"buffer_lengths":[',
    ),
    "log": (
        b"HICRLOG1\x01\0\0\0\x80\0\0\0", *(bytes([kind]) for kind in range(5)), b"\xff" * 4, bytes(128), b"k" * 32,
    ),
    "config": tuple(
        token.encode()
        for token in (
            "tiers", "type", "local", "memory", "capacity", "path", "engine", "model", "revision", "salt", "name",
            "tiers:\n- type: memory\n", "{", "}", "[", "]", ": ", "- ", "\n", '"', "'", "null", "true", "1e999", ".inf",
            ".nan", "-1", "0", "1GiB", "10XB", "1" * 5000, "[" * 2000, "{a: " * 300, "&a [*a]", "!!int ''", "!!bool x",
            "!!timestamp x", "!!python/object:os.system x", "2001-99-99", "<<: ", "? ", "\\ud800", "\\u0000", "/" * 300,
            "x" * 5000, "::", ":x", ".x:y", "json:JSONDecoder", "prefetch_threshold", "=",
            "[[tiers]]", "#", "\t", "---\n",
        )
    ),
}  # fmt: skip
