"""Parts of the shared_fs tier that need no share: a segment's index, names, what is remembered, what goes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_ext.config import Config, ConfigError
from hicache_ext.page import chain_parents
from storage_backends.base import Notes, Residency
from storage_backends.format import BLOCK, FormatError, UnknownVersion
from storage_backends.shared_fs.catalog import Catalog, Segment
from storage_backends.shared_fs.cleaning import Known, Ledger
from storage_backends.shared_fs.directory import BUCKET_SECONDS, bucket_ns, bucket_of, buckets, is_recent, to_list
from storage_backends.shared_fs.segment import SegmentIndex, SegmentName
from tests.pages import chain, key_batch, namespace

GOLDEN = Path(__file__).parent / "golden_segment_v1.bin"
SPACE = namespace((300, 77))
NS = 10**9
NOON = 1_800_000_000 * NS


def index(pages: int = 3, born: int = 987654321) -> SegmentIndex:
    keys = b"".join(chain("a", pages))
    slots = np.arange(pages, dtype=np.int64) * 2  # a slot between two pages may be empty
    return SegmentIndex(SPACE.digest, bytes(range(16)), born, 2 * BLOCK, 377, keys, chain_parents(keys, None), slots)


# ---- the index


def test_golden_bytes() -> None:
    """Written by version 1. If this fails, the format changed: that takes a new version number, not a new file."""
    assert index().encode() == GOLDEN.read_bytes()
    assert str(index().name) == "000102030405060708090a0b0c0d0e0f-3-45056.seg"


@pytest.mark.parametrize("pages", [1, 2, 50, 200])
def test_an_index_comes_back(pages: int) -> None:
    written = index(pages)
    read = SegmentIndex.decode(written.encode(), written.name)
    assert (read.keys, read.parents, read.slots.tolist()) == (written.keys, written.parents, written.slots.tolist())
    assert (read.born_ns, read.slot_bytes, read.payload_bytes) == (987654321, 2 * BLOCK, 377)
    assert SegmentName.parse(str(written.name)) == written.name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_altered_index_passes(data: st.DataObject) -> None:
    written = index()
    raw = bytearray(written.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError):
        SegmentIndex.decode(raw, written.name)


def test_an_index_that_is_cut_of_another_version_or_of_another_segment() -> None:
    written = index()
    raw = written.encode()
    for size in (0, 100, BLOCK - 1):
        with pytest.raises(FormatError):
            SegmentIndex.decode(raw[:size], written.name)
    with pytest.raises(UnknownVersion):
        SegmentIndex.decode(raw[:8] + b"\x02" + raw[9:], written.name)
    for name in (SegmentName(bytes(16), 3, written.name.size), SegmentName(written.id, 3, written.name.size + BLOCK)):
        with pytest.raises(FormatError):
            SegmentIndex.decode(raw, name)


@pytest.mark.parametrize(
    "name", ["", "x.seg", f"{'0' * 32}-1-100.seg", f"{'0' * 32}-1-8192.tmp", f"{'0' * 31}-1-8192.seg"]
)
def test_what_is_no_segment(name: str) -> None:
    assert SegmentName.parse(name) is None


# ---- directories


def test_buckets() -> None:
    assert bucket_of(NOON) == "20270115T0800"
    assert bucket_ns(bucket_of(NOON)) == NOON
    assert bucket_ns(bucket_of(NOON + 899 * NS)) == NOON
    assert buckets(["v1", "20270115T0800", "clock", "20269999T0000", "20261231T2345"]) == [
        "20261231T2345",
        "20270115T0800",
    ]


def test_an_old_bucket_is_listed_once_and_then_in_turn() -> None:
    names = [bucket_of(NOON - i * BUCKET_SECONDS * NS) for i in range(40, -1, -1)]
    late = bucket_of(NOON + 3600 * NS)  # by a clock that is ahead
    assert to_list([*names, late], set(), NOON, 0) == [late, *reversed(names)]
    known = {*names, late}
    recent = {name for name in known if is_recent(name, NOON)}
    assert late in recent
    assert {bucket_of(NOON - 3600 * NS), bucket_of(NOON)} <= recent
    turns = [set(to_list([*names, late], known, NOON, turn)) for turn in range(len(names))]
    assert all(recent <= turn and len(turn) == len(recent) + 1 for turn in turns)
    assert set().union(*turns) == known


# ---- the catalog


class Heard(list[tuple[Residency, bytes]]):
    def __call__(self, change: Residency, _: bytes, keys: bytes, __: Notes | None) -> None:
        self.extend((change, keys[i : i + 32]) for i in range(0, len(keys), 32))


def segment(name: str, born: int) -> Segment:
    return Segment(SPACE.digest, name, f"/{name}", (born, name.encode()))


def test_the_younger_segment_counts_in_either_order() -> None:
    keys = chain("a", 3)
    pages = [(key, i) for i, key in enumerate(keys)]
    for order in ((1, 2), (2, 1)):
        catalog = Catalog(100, Heard())
        made = {born: segment(f"s{born}", born) for born in order}
        for born in order:
            catalog.adopt(made[born], pages)
        assert [place and place[0] for place in catalog.find(key_batch(SPACE, keys))] == [made[2]] * 3
        assert len(catalog) == 3
        catalog.drop(made[1])
        assert catalog.flags(key_batch(SPACE, keys)).all()
        catalog.drop(made[2])
        assert not catalog.flags(key_batch(SPACE, keys)).any()
        assert len(catalog) == 0


def test_what_is_reported_is_ours_and_once() -> None:
    heard = Heard()
    catalog = Catalog(100, heard)
    mine, theirs, keys = segment("mine", 1), segment("theirs", 2), chain("a", 4)
    assert catalog.store(mine, [(key, i) for i, key in enumerate(keys[:3])]) == keys[:3]
    assert catalog.store(mine, [(keys[0], 7)]) == []
    catalog.adopt(theirs, [(keys[0], 0), (keys[3], 1)])
    assert heard == [(Residency.STORED, key) for key in keys[:3]]
    heard.clear()
    catalog.drop(mine)  # the first page is in their segment by now
    assert sorted(heard) == sorted((Residency.REMOVED, key) for key in keys[1:3])
    heard.clear()
    catalog.drop(theirs)
    assert heard == [(Residency.REMOVED, keys[0])]


def test_the_oldest_segments_are_forgotten_beyond_the_limit() -> None:
    catalog = Catalog(10, Heard())
    for born in (5, 1, 3, 2, 4):
        catalog.adopt(segment(f"s{born}", born), [(key, i) for i, key in enumerate(chain(str(born), 4))])
    assert len(catalog) <= 10
    assert [bool(catalog.flags(key_batch(SPACE, chain(str(born), 4))).all()) for born in (1, 2, 3, 4, 5)] == [
        False, False, False, True, True,
    ]  # fmt: skip


# ---- what goes first


SEGMENTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.tuples(st.integers(0, 100), st.integers(0, 50), st.integers(1, 20)),
    max_size=30,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    SEGMENTS, st.integers(0, 300), st.none() | st.integers(0, 150), st.sets(st.text("abcdef", min_size=1, max_size=4))
)
def test_what_goes_is_the_least_recently_used_and_no_more_than_must(
    made: dict[str, tuple[int, int, int]], capacity: int, expired: int | None, gone: set[str]
) -> None:
    """Of each segment: when its bucket began, how much later it was used, its size."""
    ledger = Ledger()
    for name, (began, _, size) in made.items():
        assert (
            ledger.enter(str(began), {**{n: s for n, (b, _, s) in made.items() if b == began}, name: size}, began) == []
        )
    used = {name: began + later for name, (began, later, _) in made.items()}
    total = sum(size for _, _, size in made.values())
    assert ledger.used == total

    def look(known: Known) -> int | None:
        return None if known.name in gone else used[known.name]

    order = []
    for victim in ledger.victims(lambda: ledger.used - capacity, expired, look):
        order.append(victim.name)
        assert ledger.used == total - sum(made[name][2] for name in order)
    assert len(set(order)) == len(order)
    left = set(made) - set(order)
    assert ledger.used <= capacity or not left
    chosen = [name for name in order if name not in gone]
    kept = [name for name in left if name not in gone]
    if chosen and kept:
        assert max(used[name] for name in chosen) <= min(used[name] for name in kept)
    if expired is not None:
        assert all(used[name] >= expired for name in kept)
    if chosen and (expired is None or used[chosen[-1]] >= expired) and order[-1] == chosen[-1]:
        assert ledger.used + made[chosen[-1]][2] > capacity, "the last one had to go"


def test_only_what_is_next_to_go_is_looked_at() -> None:
    ledger = Ledger()
    for bucket in range(100):
        ledger.enter(f"{bucket:03}", {f"{bucket}-{i}": 1 for i in range(10)}, bucket)
    looks: list[str] = []

    def look(known: Known) -> int:
        looks.append(known.name)
        return known.used_ns if known.used_ns % 1 else int(known.directory)

    assert len(list(ledger.victims(lambda: ledger.used - 990, None, look))) == 10
    assert len(looks) <= 20


def test_what_another_host_did_is_added_up() -> None:
    ledger = Ledger()
    assert ledger.enter("d", {"a": 5, "b": 7}, 1, unfinished=3) == []
    assert (ledger.used, len(ledger)) == (15, 2)
    assert ledger.enter("d", {"b": 7, "c": 1}, 1) == ["a"]
    assert (ledger.used, len(ledger)) == (8, 2)
    assert sorted(ledger.enter("d", {}, 1)) == ["b", "c"]
    assert (ledger.used, len(ledger), ledger.directories) == (0, 0, [])


# ---- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"path: missing"),
        ({"path": "share"}, r"path = .*not absolute"),
        ({"path": "/mnt/a/b", "mount": "/mnt/c"}, r"mount = .*not below it"),
        ({"path": "/mnt/a", "capacity": "1KiB"}, r"capacity = .*too small"),
        ({"path": "/mnt/a", "ttl": 60}, r"ttl = .*an hour apart"),
        ({"path": "/mnt/a", "segment_size": "1KiB"}, r"segment_size"),
        ({"path": "/mnt/a", "seal_key_env": "NOT_THERE"}, r"seal_key_env = 'NOT_THERE'"),
    ],
)
def test_options_that_cannot_work_name_key_and_fix(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiers\[0\]\.{says}") as caught:
        Config.load({"tiers": [{"type": "storage_backends.shared_fs:SharedFsBackend", **options}]})
    assert "Fix: " in str(caught.value)
