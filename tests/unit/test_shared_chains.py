"""Which canonical pages cover SGLang's pages, learnt in pieces: against the whole prompt at once."""

from __future__ import annotations

import hashlib
import itertools
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext import chain
from hicache_ext.sglang.chains import Chains, Covered, seed_of
from hicache_ext.sglang.tokens import Noted

PLAIN = (None, None)


class Naming:
    """SGLang's chain of a plain prompt, over its own pages."""

    has_own_chain = True

    def fits(self, first: bytes, tokens: Any, space: Any, prior: str | None) -> bool:
        return own_keys(tokens.ravel().tolist(), len(tokens), prior)[0] == first


def own_keys(tokens: list[int], page: int, prior: str | None = None) -> list[bytes]:
    keys, digest = [], bytes.fromhex(prior or "")
    for at in range(0, len(tokens) - page + 1, page):
        digest = hashlib.sha256(digest + b"".join(t.to_bytes(4, "little") for t in tokens[at : at + page])).digest()
        keys.append(digest)
    return keys


def expected(tokens: list[int], page: int, shared: int) -> list[Covered | None]:
    keys = chain.extend(chain.seed(), tokens, shared)
    covered: list[Covered | None] = []
    for begin in range(0, len(tokens) - page + 1, page):
        first, last = begin // shared, -(-(begin + page) // shared)
        part = keys[first * 32 : last * 32]
        before = keys[(first - 1) * 32 : first * 32] if first else None
        covered.append(Covered(part, begin % shared, before) if len(part) == (last - first) * 32 else None)
    return covered


@given(
    sizes=st.sampled_from([(1, 4), (2, 4), (3, 6), (4, 4), (8, 4), (6, 3)]), pages=st.integers(1, 30),
    cuts=st.sets(st.integers(1, 29)), batches=st.sets(st.integers(1, 29)), by_lookup=st.booleans(),
)  # fmt: skip
def test_learnt_in_pieces_is_the_whole(
    sizes: tuple[int, int], pages: int, cuts: set[int], batches: set[int], by_lookup: bool
) -> None:
    """cuts: where one operation ends and the next begins. batches: where one call does."""
    page, shared = sizes
    tokens = [1000 + i for i in range(pages * page)]
    keys = own_keys(tokens, page)
    chains = Chains(page, shared)
    edges = sorted({0, pages, *(cut for cut in cuts if cut < pages)})
    for begin, end in itertools.pairwise(edges):
        key = tokens[begin * page : end * page]
        calls = sorted({begin, end, *(at for at in batches if begin < at < end)})
        before = keys[begin - 1].hex() if begin else None
        for at, until in itertools.pairwise(calls):
            noted = Noted(key, (at - begin) * page, space=PLAIN)
            run = chains.learn(keys[at:until], noted, before, Naming(), "")  # type: ignore[arg-type]
            assert run is not None
            assert run.lead == at * page % shared
            before = keys[until - 1].hex()
    if by_lookup:  # the whole prompt is asked for afterwards: what was unknown at a cut becomes known
        with chains.asking(Sequence(tokens), None):
            chains.asked(keys, Naming(), "")  # type: ignore[arg-type]
        assert chains.covering(keys) == expected(tokens, page, shared)
    else:
        known = [found for found, whole in zip(chains.covering(keys), expected(tokens, page, shared), strict=True)
                 if found is not None or whole is None]  # fmt: skip
        wanted = [whole for found, whole in zip(chains.covering(keys), expected(tokens, page, shared), strict=True)
                  if found is not None or whole is None]  # fmt: skip
        assert known == wanted
        assert len(edges) > 2 or known == expected(tokens, page, shared)


class Sequence(list[int]):
    """SGLang's token sequence of a plain request."""

    extra_key = cache_salt = None


def test_other_tokens_than_the_key_says_teach_nothing() -> None:
    chains, tokens = Chains(4, 8), list(range(16))
    keys = own_keys(tokens, 4)
    assert chains.learn(keys, Noted([t + 1 for t in tokens], 0, space=PLAIN), None, Naming(), "") is None  # type: ignore[arg-type]
    assert chains.learn(keys[2:], Noted(tokens[8:], 0, space=PLAIN), keys[1].hex(), Naming(), "") is None  # type: ignore[arg-type]
    assert chains.learn(keys, Noted(tokens, 0), None, Naming(), "") is None  # type: ignore[arg-type]
    assert chains.covering(keys) == [None] * 4


def test_what_was_learnt_is_bounded_and_what_is_used_stays() -> None:
    chains, tokens = Chains(1, 1, limit=8), list(range(20))
    keys = own_keys(tokens, 1)
    chains.learn(keys[:8], Noted(tokens, 0, space=PLAIN), None, Naming(), "")  # type: ignore[arg-type]
    chains.covering(keys[:1])
    chains.learn(keys[8:15], Noted(tokens, 8, space=PLAIN), keys[7].hex(), Naming(), "")  # type: ignore[arg-type]
    assert len(chains) == 8
    assert [found is not None for found in chains.covering(keys[:2])] == [True, False]


def test_a_lookup_is_its_own_threads() -> None:
    chains, tokens = Chains(4, 4), list(range(8))
    keys = own_keys(tokens, 4)
    with chains.asking(Sequence(tokens), None):
        other = threading.Thread(target=chains.asked, args=(keys, Naming(), ""))
        other.start()
        other.join()
    chains.asked(keys, Naming(), "")  # type: ignore[arg-type]  # nothing is asked for any more
    assert len(chains) == 0


@pytest.mark.parametrize(
    ("space", "own_chain", "seed"),
    [
        ((None, None), True, chain.seed()),
        ((None, "tenant"), True, chain.seed("tenant")),
        (("tenant", None), False, chain.seed("tenant")),
        (("adapter", "tenant"), True, chain.seed("tenant", "sglang\0digest\0adapter")),
    ],
)
def test_salts_are_as_in_vllm_and_adapters_of_sglang_alone(space: Any, own_chain: bool, seed: bytes) -> None:
    assert seed_of(space, "digest", own_chain) == seed
