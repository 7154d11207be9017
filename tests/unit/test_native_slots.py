"""Runs of slots in compiled code, against the Python that they are a copy of."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends.base import Outcome
from storage_backends.format import BLOCK
from storage_backends.object import ObjectFormats
from storage_backends.shared_fs.native_slots import NativeSlots, slots_for
from storage_backends.shared_fs.slots import Slots, Written
from storage_backends.slot_form import SlotForm, span
from storage_backends.slot_form import keys as packed
from tests.pages import HostPool, chain, namespace

HARMS = ("none", "header", "payload", "end", "key")
SHAPES = ((65536, 65536), (70272,), (20_000, 300), (4096,), (1_000_000, 17))


def both(lengths: tuple[int, ...]) -> tuple[Slots, NativeSlots]:
    form = ObjectFormats(BLOCK).of(namespace(lengths))
    return Slots(form, sealed=False), NativeSlots(form)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    try:
        fd = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        fd = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.sampled_from(SHAPES), order=st.permutations(range(9)), count=st.integers(1, 9), slot=st.integers(0, 3),
    writer=st.integers(0, 1), reader=st.integers(0, 1), harm=st.sampled_from(HARMS),
    at=st.integers(0, 1 << 30), skew=st.sampled_from([0, 64]),
)  # fmt: skip
def test_both_store_the_same_bytes_and_judge_alike(
    file: int, lengths: tuple[int, ...], order: list[int], count: int, slot: int, writer: int, reader: int, harm: str,
    at: int, skew: int,
) -> None:  # fmt: skip
    slots = both(lengths)
    space, keys, size = namespace(lengths), chain("a", 9), slots[0].slot_bytes
    pages = order[:count]
    os.ftruncate(file, 0)
    assert slots[writer].write(file, HostPool(space, 9, skew).write_batch(keys), pages, slot, BLOCK) == Written(
        count, 0
    )
    assert os.fstat(file).st_size == (slot + count) * size
    harmed = at % count
    start, payload = (slot + harmed) * size, sum(lengths)
    where = {"header": start + 32 + at % 64, "payload": start + slots[0].form.head_bytes + at % payload}.get(harm)
    if where is not None:
        flip(file, where)
    elif harm == "end":
        os.ftruncate(file, start + at % (size // 512) * 512)
    asked = list(keys)
    if harm == "key":
        asked[pages[harmed]] = chain("other", 1)[0]
    pool = HostPool(space, 9, skew)
    outcomes, errors = slots[reader].read(file, pool.batch(asked), pages, slot, BLOCK)
    assert errors == [0] * count
    good = [Outcome.HIT] * count
    if harm == "end":
        good[harmed:] = [Outcome.CORRUPT] * (count - harmed)
        # What pads a slot is nobody's: a page that has lost only of that is whole.
        whole = at % (size // 512) * 512 >= slots[0].form.size
        good[harmed] = Outcome.HIT if whole else Outcome.CORRUPT
    elif harm != "none":
        good[harmed] = Outcome.CORRUPT
    assert outcomes == good
    for page, outcome in zip(pages, outcomes, strict=True):
        if outcome is Outcome.HIT:
            assert pool.right(page, keys[page])


def flip(file: int, where: int) -> None:
    path = f"/proc/self/fd/{file}"
    with open(path, "r+b") as plain:
        plain.seek(where)
        (byte,) = plain.read(1)
        plain.seek(where)
        plain.write(bytes([byte ^ 0x10]))


def test_errors_are_those_of_the_pages(file: int, tmp_path: Path) -> None:
    _, native = both((65536,))
    space, keys = namespace((65536,)), chain("a", 4)
    batch = HostPool(space, 4).write_batch(keys)
    reading = os.open(tmp_path / "slots", os.O_RDONLY)
    assert native.write(reading, batch, [0, 1, 2, 3], 0, BLOCK) == Written(0, errno.EBADF)
    os.close(reading)
    folder = os.open(tmp_path, os.O_RDONLY)
    assert native.read(folder, batch, [0, 1], 0, 1)[1] == [errno.EISDIR] * 2
    os.close(folder)
    with open("/dev/full", "r+b") as full:
        assert native.write(full.fileno(), batch, [0, 1], 0, 1) == Written(0, errno.ENOSPC)


def test_sealed_pages_stay_in_python() -> None:
    form = ObjectFormats(BLOCK).of(namespace((4096,)))
    assert type(slots_for(form, sealed=True)) is Slots
    assert type(slots_for(form, sealed=False)) is NativeSlots


def test_pages_in_any_order_have_their_own_keys_and_addresses() -> None:
    space, keys = namespace((4096, 8192)), chain("a", 6)
    batch, form = HostPool(space, 6).batch(keys), SlotForm(space)
    for pages in (range(6), range(2, 5), [3, 1, 5], [4, 3, 2], [1], [0, 2, 1, 3], [2, 3, 4]):
        part = span(pages)
        assert packed(batch.keys, part) == b"".join(keys[page] for page in pages)
        expected = np.concatenate([batch.addresses[2 * page : 2 * page + 2] for page in pages])
        assert form.addresses(batch, part).tolist() == expected.tolist()
    assert (span(range(2, 5)), span([2, 3, 4]), span([4, 3, 2])) == (slice(2, 5), slice(2, 5), [4, 3, 2])
