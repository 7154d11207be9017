"""The event messages: their bytes beside the engines' own classes and recorded ones, and reading what others write."""

from __future__ import annotations

import ast
import enum
import os
import subprocess
import typing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext.events.model import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CostedBlockStored,
    Decoded,
    Dialect,
    EventBatch,
    LoadCost,
    Medium,
    decode,
    encode,
    name_of,
)
from hicache_ext.sglang import announcing

STORED = BlockStored([-2, 2**62], 7, [1, 2, 300, 70000], 2, None, "DISK")
BATCH = EventBatch(1.5, [STORED, BlockRemoved([-2], "EXTERNAL"), AllBlocksCleared()], 3)

#: Recorded from SGLang 0.5.23's KVEventBatch.
SGLANG_BYTES = bytes.fromhex(
    "93cb3ff80000000000009387a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392fecf4000000000000000b1706172"
    "656e745f626c6f636b5f6861736807a9746f6b656e5f696473940102cd012cce00011170aa626c6f636b5f73697a6502a76c6f72615f6964c0"
    "a66d656469756da44449534b83a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391fea66d656469756da8455854"
    "45524e414c81a474797065b0416c6c426c6f636b73436c656172656403"
)

_UNPACKED = Path(os.environ.get("HICACHE_EXT_SGLANG_DIR", Path(__file__).parents[2] / "build" / "sglang"))


def sglang_sources() -> list[Path]:
    """kv_events.py of the installed SGLang and of those unpacked for the version tests."""
    found = sorted(_UNPACKED.glob("*/sglang/srt/disaggregation/kv_events.py"))
    spec = find_spec("sglang")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += [path for path in [Path(folder, "srt/disaggregation/kv_events.py")] if path.exists()]
    return found


def engine_classes(source: Path) -> dict[str, typing.Any]:
    """The message classes of that file, without importing the engine."""
    wanted = ("EventBatch", "KVCacheEvent", "BlockStored", "BlockRemoved", "AllBlocksCleared", "KVEventBatch")
    body = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) in wanted]
    names: dict[str, typing.Any] = {"msgspec": msgspec, "enum": enum, **vars(typing), "__name__": "engine"}
    exec(compile(ast.Module(body, []), str(source), "exec", dont_inherit=True), names)
    return names


def in_engine(classes: dict[str, typing.Any], batch: EventBatch) -> typing.Any:
    events = []
    for event in batch.events:
        kind = classes[type(event).__name__]
        fields = {name: getattr(event, name) for name in kind.__struct_fields__}
        events.append(kind(**fields))
    return classes["KVEventBatch"](batch.ts, events, batch.dp_rank)


FULL = EventBatch(
    2.0, [BlockStored([5], None, [9, 9], 2, None, None, "salt", "session", "lora"), BlockRemoved([1, 2])], None
)


@pytest.mark.sglang
@pytest.mark.parametrize("source", sglang_sources(), ids=str)
def test_bytes_are_sglangs(source: Path) -> None:
    classes = engine_classes(source)
    as_maps = classes["BlockStored"].__struct_config__.array_like is False
    for batch in (BATCH, FULL):
        known = set(classes["BlockStored"].__struct_fields__)
        theirs = msgspec.msgpack.encode(in_engine(classes, batch))
        reader = msgspec.msgpack.Decoder(classes["KVEventBatch"])
        if as_maps and known >= {"lora_name"}:
            assert encode(batch) == theirs
        if as_maps:
            assert reader.decode(encode(batch)) == reader.decode(theirs)
        else:  # 0.5.17 wrote arrays, without the last fields
            with pytest.raises(msgspec.ValidationError):
                reader.decode(encode(batch))
        read = decode(theirs)
        assert read.problems == ()
        assert in_engine(classes, read.batch) == reader.decode(theirs)


def test_golden_bytes() -> None:
    assert encode(BATCH) == SGLANG_BYTES
    assert decode(SGLANG_BYTES) == Decoded(BATCH)


#: vLLM 0.3x: the fields of its events, in order; those before "*" are always written.
_VLLM = {
    "BlockStored": "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name * extra_keys "
    "group_idx kv_cache_spec_kind locality ownership session_id",
    "BlockRemoved": "block_hashes medium * group_idx locality ownership",
    "AllBlocksCleared": "*",
}


@pytest.mark.parametrize("batch", [BATCH, FULL])
def test_bytes_are_vllms(batch: EventBatch) -> None:
    events = []
    for event in batch.events:
        always, sometimes = _VLLM[type(event).__name__].split("*")
        fields = {name: getattr(event, name) for name in always.split()}
        fields |= {name: value for name in sometimes.split() if (value := getattr(event, name, None)) is not None}
        events.append({"type": type(event).__name__, **fields})
    assert encode(batch, Dialect.VLLM) == msgspec.msgpack.encode([batch.ts, events, batch.dp_rank])


_hashes = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4, unique=True)
_text = st.none() | st.text(max_size=5)
_media = st.sampled_from([*Medium, None])
_either = {
    "block_hashes": _hashes,
    "parent_block_hash": st.none() | st.integers(-(2**63), 2**63 - 1),
    "token_ids": st.lists(st.integers(0, 2**32 - 1)),
    "block_size": st.integers(1, 256),
    "lora_id": st.none() | st.integers(0, 9),
    "medium": _media,
    "session_id": _text,
    "lora_name": _text,
}
_vllm = {"group_idx": st.none() | st.just(1), "locality": _text, "ownership": _text}
_events = {
    Dialect.SGLANG: st.builds(BlockStored, **_either, cache_salt=_text)
    | st.builds(BlockRemoved, _hashes, _media)
    | st.builds(AllBlocksCleared),
    Dialect.VLLM: st.builds(BlockStored, **_either, **_vllm, kv_cache_spec_kind=_text)
    | st.builds(BlockRemoved, _hashes, _media, **_vllm)
    | st.builds(AllBlocksCleared),
}


@given(st.data(), st.sampled_from(Dialect), st.floats(0, 1e10), st.none() | st.integers(0, 8))
def test_round_trip(data: st.DataObject, dialect: Dialect, ts: float, rank: int | None) -> None:
    batch = EventBatch(ts, data.draw(st.lists(_events[dialect], max_size=4)), rank)
    assert decode(encode(batch, dialect)) == Decoded(batch)


COSTED = CostedBlockStored(
    **{name: getattr(STORED, name) for name in STORED.__struct_fields__}, load_cost=LoadCost(1.8e9, 0.0004)
)
#: A store that says a cost, and events beside it: what a reader that does not know the field must read all the same.
COSTS = EventBatch(1.5, [COSTED, *BATCH.events], 3)
WITHOUT_COSTS = EventBatch(1.5, [STORED, *BATCH.events], 3)


def test_a_cost_is_read_where_there_is_one() -> None:
    payload = encode(COSTS)
    assert b"load_cost" in payload
    assert decode(payload) == Decoded(COSTS)
    assert {name_of(event) for event in COSTS.events} == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    assert decode(encode(COSTS, Dialect.VLLM)) == Decoded(COSTS)


@pytest.mark.sglang
@pytest.mark.parametrize("source", sglang_sources(), ids=str)
def test_sglang_writes_costs_and_reads_past_them(source: Path) -> None:
    classes = engine_classes(source)
    convert = announcing._converter(SimpleNamespace(**classes))
    batch = classes["KVEventBatch"](1.5, [convert(COSTED), convert(STORED)], 3)
    payload = msgspec.msgpack.encode(batch)
    reader = msgspec.msgpack.Decoder(classes["KVEventBatch"])
    plain = in_engine(classes, EventBatch(1.5, [STORED, STORED], 3))
    assert reader.decode(payload) == plain
    if classes["BlockStored"].__struct_config__.array_like:
        assert payload == msgspec.msgpack.encode(plain), "0.5.17 writes arrays, which have no place for it"
    else:
        assert decode(payload) == Decoded(EventBatch(1.5, [COSTED, STORED], 3))
        assert reader.decode(encode(COSTS)) == in_engine(classes, WITHOUT_COSTS)


VLLM = Path(os.environ.get("VLLM_PYTHON") or Path(__file__).parents[2] / "build/vllm/bin/python")


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="needs make vllm-env")
def test_vllm_reads_past_costs() -> None:
    """vLLM's own decoder, as its subscribers use it, in vLLM's environment."""
    code = """
import sys, msgspec
from vllm.distributed.kv_events import KVEventBatch
reader = msgspec.msgpack.Decoder(KVEventBatch)
costed, plain = (reader.decode(bytes.fromhex(word)) for word in sys.argv[1:])
kinds = [type(event).__name__ for event in costed.events]
assert kinds == ["BlockStored", "BlockStored", "BlockRemoved", "AllBlocksCleared"], kinds
assert costed == plain and costed.events[0].block_hashes == [-2, 2**62], costed
print("passed over")
"""
    words = [encode(batch, Dialect.VLLM).hex() for batch in (COSTS, WITHOUT_COSTS)]
    assert words[0] != words[1]
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([str(VLLM), "-c", code, *words], capture_output=True, text=True, timeout=300, env=env)
    assert "passed over" in done.stdout, done.stderr


def test_fields_that_nobody_knows_are_read_past() -> None:
    event = {"type": "BlockRemoved", "block_hashes": [1], "medium": "DISK", "colour": "blue"}
    assert decode(msgspec.msgpack.encode([1.0, [event], 0])) == Decoded(EventBatch(1.0, [BlockRemoved([1], "DISK")], 0))


@pytest.mark.parametrize(
    ("payload", "left", "said"),
    [
        ([1.0, [{"type": "BlockMoved"}, ["AllBlocksCleared"]], 0], [AllBlocksCleared()], "unknown type 'BlockMoved'"),
        (
            [1.0, [{"type": "BlockRemoved", "block_hashes": [b"\xff" * 24 + b"\0" * 7 + b"\5"]}], 0],
            [BlockRemoved([5])],
            "hashes as bytes",
        ),
        ([1.0, [{"type": "BlockStored", "block_hashes": 5}], 0], [], "event 0 (BlockStored)"),
        ([1.0, [["AllBlocksCleared"]]], [AllBlocksCleared()], "2 items"),
        ([1.0, [], 0, 0], [], "4 items"),
        ({"ts": 2.0, "events": [["BlockRemoved", [4], "GPU", 0]]}, [BlockRemoved([4], "GPU")], ""),
        (["now", [], 0], [], "ts is 'now'"),
        (7, [], "not [ts, events, rank]"),
    ],
)  # fmt: skip
def test_what_a_strict_reader_drops_is_named(payload: object, left: list[object], said: str) -> None:
    read = decode(msgspec.msgpack.encode(payload))
    assert read.batch.events == left
    assert said in "; ".join(read.problems)
    assert bool(said) == bool(read.problems)


@given(st.binary(max_size=64))
def test_decode_takes_any_bytes(payload: bytes) -> None:
    assert isinstance(decode(payload), Decoded)


@given(st.integers(0, len(SGLANG_BYTES) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_passes_for_the_same_batch(at: int, flip: int) -> None:
    broken = bytearray(SGLANG_BYTES)
    broken[at] ^= flip
    assert decode(bytes(broken)) != Decoded(BATCH)


def test_media() -> None:
    assert [Medium.of(name) for name in ("GPU", None, "CPU", "NVME", "STORAGE", "REMOTE", "disk")] == [
        Medium.DEVICE, Medium.DEVICE, Medium.HOST, Medium.DISK, Medium.DISK, Medium.EXTERNAL, None,
    ]  # fmt: skip
