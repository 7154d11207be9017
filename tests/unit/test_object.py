"""Pages as objects, bare and sealed: golden bytes, round trips, and that nothing altered or misfiled passes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends.base import Outcome
from storage_backends.format import SlotHeader
from storage_backends.object import ObjectFormat, ObjectFormats
from storage_backends.seal import Seal
from tests.pages import HostPool, chain, namespace

GOLDEN = Path(__file__).parent / "golden_object_v1.bin"
LENGTHS = (70000, 300)
GOLDEN_LENGTHS = (300, 77)
KEYS = chain("a", 4)


@pytest.fixture(params=["bare", "sealed"])
def seal(request: pytest.FixtureRequest) -> Seal | None:
    if request.param == "bare":
        return None
    pytest.importorskip("cryptography")
    return Seal(bytes(range(32)))


def stored(pool: HostPool, seal: Seal | None, page: int = 0) -> bytes:
    batch = pool.write_batch(KEYS)
    form = ObjectFormat(batch.namespace, seal=seal)
    head, buffers = form.prepare(batch, page)
    data = bytes(head) + b"".join(buffers)
    assert (len(head), len(data)) == (form.head_bytes, form.size)
    return data


def judged(pool: HostPool, seal: Seal | None, data: bytes, page: int = 0) -> Outcome:
    """What the object `data` is, when asked for as page number `page`."""
    pool.poison()
    batch = pool.batch(KEYS)
    form = ObjectFormat(batch.namespace, seal=seal)
    at = form.head_bytes
    for buffer in batch.buffers(page):
        buffer[:] = data[at : at + len(buffer)]
        at += len(buffer)
    outcome = form.verify(batch, page, bytearray(data[: form.head_bytes]))
    assert outcome != Outcome.HIT or pool.right(page, KEYS[page])
    return outcome


def test_golden_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by version 1. If this fails, the format changed: that takes a new version number, not a new file."""
    monkeypatch.setattr("time.time_ns", lambda: 987654321)
    assert stored(HostPool(namespace(GOLDEN_LENGTHS), 4), None, 1) == GOLDEN.read_bytes()


def test_golden_bytes_are_understood() -> None:
    assert judged(HostPool(namespace(GOLDEN_LENGTHS), 4), None, GOLDEN.read_bytes(), 1) == Outcome.HIT
    header = SlotHeader.decode(GOLDEN.read_bytes(), 64)
    assert (header.key, header.parent, header.lengths) == (KEYS[1], KEYS[0], GOLDEN_LENGTHS)


def test_a_small_page_has_a_small_header() -> None:
    batch = HostPool(namespace((70272,), page_size=1), 1).batch(KEYS[:1])
    assert ObjectFormat(batch.namespace).head_bytes == 512
    assert ObjectFormat(batch.namespace, step=4096).head_bytes == 4096


def test_tokens_and_hashes_travel() -> None:
    pool = HostPool(namespace(LENGTHS), 1)
    tokens = np.arange(16, dtype=np.uint32)[None]
    batch = replace(pool.write_batch(KEYS[:1]), tokens=tokens, event_hashes=np.array([[5, -6]], np.int64))
    header = SlotHeader.decode(ObjectFormat(batch.namespace).prepare(batch, 0)[0], 64)
    assert header.tokens is not None
    assert header.tokens.tolist() == list(range(16))
    assert (header.event_hash, header.parent_event_hash) == (5, -6)
    form = ObjectFormat(batch.namespace)
    notes = form.notes(form.prepare(replace(batch, salt="tenant", lora="adapter"), 0)[0])
    assert notes is not None
    assert (notes.tokens.tolist(), notes.hashes.tolist()) == ([list(range(16))], [[5, -6]])
    assert (notes.salt, notes.lora) == ("tenant", "adapter")
    assert form.notes(form.prepare(pool.write_batch(KEYS[:1]), 0)[0]) is None


def test_a_batch_with_other_buffers_is_a_mistake() -> None:
    mine, theirs = HostPool(namespace((4096,)), 1), HostPool(namespace((8192,)), 1)
    with pytest.raises(ValueError, match="not those of its namespace"):
        ObjectFormats().of(theirs.space).check(mine.batch(KEYS[:1]))


@pytest.mark.parametrize("what", ["another page", "another namespace", "cut", "zeroes"])
def test_what_is_not_the_page_is_corrupt(seal: Seal | None, what: str) -> None:
    pool = HostPool(namespace(LENGTHS), 4)
    data = stored(pool, seal)
    assert judged(pool, seal, data) == Outcome.HIT
    match what:
        case "another page":
            data = stored(pool, seal, 1)
            assert judged(pool, seal, data, 1) == Outcome.HIT
        case "another namespace":
            data = stored(HostPool(namespace(LENGTHS, model="model-b"), 4), seal)
        case "cut":
            data = data[:-100] + bytes(100)
        case "zeroes":
            data = bytes(len(data))
    assert judged(pool, seal, data) == Outcome.CORRUPT


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(at=st.one_of(st.integers(0, 1100), st.integers(0, 70300 + 640)), flip=st.integers(1, 255))
def test_no_flipped_byte_passes(seal: Seal | None, at: int, flip: int) -> None:
    pool = HostPool(namespace(LENGTHS), 4)
    data = bytearray(stored(pool, seal))
    data[at % len(data)] ^= flip
    assert judged(pool, seal, bytes(data)) == Outcome.CORRUPT


def test_a_seal_hides_everything_and_wants_its_own_key() -> None:
    pytest.importorskip("cryptography")
    pool = HostPool(namespace(LENGTHS), 4)
    key = os.urandom(32)
    data = stored(pool, Seal(key))
    bare = stored(pool, None)
    assert all(bare[i : i + 16] not in data for i in range(0, len(bare) - 16, 1000))
    assert KEYS[0] not in data
    assert judged(pool, Seal(key), data) == Outcome.HIT
    assert judged(pool, Seal(os.urandom(32)), data) == Outcome.CORRUPT
    assert stored(pool, Seal(key)) != data, "a nonce is never used twice"
