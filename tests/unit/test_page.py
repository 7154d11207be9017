"""Identity: two configurations that differ in anything never share a key."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext.page import (
    NO_PARENT,
    Namespace,
    PageKey,
    PageLayout,
    Shard,
    chain_parents,
    pack_key,
    pack_keys,
    split_keys,
)

text = st.text(max_size=12)
layouts = st.builds(
    PageLayout,
    kind=st.sampled_from(["mha", "mla", "mamba"]),
    order=st.sampled_from(["layer_first", "page_first", "page_first_direct", "page_head", "canonical"]),
    dtype=st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "int8"]),
    page_size=st.sampled_from([1, 16, 64]),
    buffer_lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    geometry=st.lists(st.tuples(text, st.integers(0, 2) | text), max_size=2).map(tuple),
)


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    ranks = [draw(st.integers(0, size - 1)) for size in sizes]
    return Shard(*[number for pair in zip(ranks, sizes, strict=True) for number in pair])


namespaces = st.builds(
    Namespace,
    model=text,
    weights=text,
    layout=layouts,
    shard=shards(),
    quantisation=text,
    salt=text,
    lora=text,
    pool=text,
    tag=text,
)


@given(namespaces, namespaces)
def test_different_fields_give_different_keys(one: Namespace, other: Namespace) -> None:
    page = bytes(32)
    assert (one == other) == (one.digest == other.digest)
    assert (one == other) == (PageKey(one, page).packed == PageKey(other, page).packed)


BASE = Namespace("m", "w", PageLayout("mha", "page_first", "bfloat16", 16, (4096, 4096), (("layers", 4),)), Shard(0, 2))
OTHERS = {
    "model": replace(BASE, model="m2"),
    "weights": BASE.with_weights("w2"),
    "kind": replace(BASE, layout=replace(BASE.layout, kind="mla")),
    "order": replace(BASE, layout=replace(BASE.layout, order="layer_first")),
    "dtype": replace(BASE, layout=replace(BASE.layout, dtype="float16")),
    "page size": replace(BASE, layout=replace(BASE.layout, page_size=32)),
    "buffer lengths": replace(BASE, layout=replace(BASE.layout, buffer_lengths=(8192,))),
    "geometry": replace(BASE, layout=replace(BASE.layout, geometry=(("layers", 5),))),
    "tp rank": replace(BASE, shard=Shard(1, 2)),
    "tp size": replace(BASE, shard=Shard(0, 4)),
    "pp": replace(BASE, shard=Shard(0, 2, 0, 2)),
    "cp": replace(BASE, shard=Shard(0, 2, cp_size=2)),
    "dcp": replace(BASE, shard=Shard(0, 2, dcp_size=2)),
    "quantisation": replace(BASE, quantisation="fp8"),
    "salt": replace(BASE, salt="tenant"),
    "lora": replace(BASE, lora="adapter"),
    "salt is not lora": replace(BASE, salt="", lora="tenant"),
    "pool": BASE.for_pool("swa", BASE.layout),
    "tag": replace(BASE, tag="canonical"),
}


def test_each_identity_field_counts() -> None:
    digests = {BASE.digest, *(other.digest for other in OTHERS.values())}
    assert len(digests) == len(OTHERS) + 1


def test_the_digest_is_final() -> None:
    # A change here makes every stored page unreachable: it needs a new domain string, on purpose.
    assert BASE.digest.hex() == "e6184192a088c2d1d5a9d1d2bd107c2d"


def test_secrets_are_not_described() -> None:
    secret = replace(BASE, salt="tenant-secret", lora="adapter-secret")
    assert b"secret" not in secret.description
    assert b"secret" not in repr(secret).encode()


def test_ranks_outside_their_group_are_refused() -> None:
    with pytest.raises(ValueError, match="tp_rank 2"):
        Shard(2, 2)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_hex_keys_are_their_bytes(keys: list[bytes]) -> None:
    assert split_keys(pack_keys([key.hex() for key in keys])) == keys


@given(st.lists(st.text(max_size=80), unique=True, max_size=8))
def test_any_string_is_a_key_of_its_own(keys: list[str]) -> None:
    packed = split_keys(pack_keys(keys))
    assert [len(key) for key in packed] == [32] * len(keys)
    normal = {key.lower() if len(key) == 64 else key for key in keys}
    assert len(set(packed)) >= len(normal) - sum(key.lower() != key for key in keys if len(key) == 64)
    assert packed == [pack_key(key) for key in keys]


def test_a_suffixed_hash_is_not_the_hash() -> None:
    page = hashlib.sha256(b"x").hexdigest()
    assert len({pack_key(page), pack_key(page + ".draft"), pack_key(page[:-2] + "  "), pack_key("")}) == 4


def test_parents_of_a_chain() -> None:
    a, b, c = (bytes([i]) * 32 for i in (1, 2, 3))
    assert split_keys(chain_parents(a + b, c)) == [c, a]
    assert split_keys(chain_parents(a + b, None)) == [NO_PARENT, a]
    assert chain_parents(b"", c) == b""
