"""Page keys that belong to no engine: golden vectors, and what must never meet."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext import chain
from hicache_ext.page import KEY_BYTES, split_keys
from hicache_ext.vllm.chains import Adapters, RequestChain


def test_golden_vectors() -> None:
    """By hand from the definition, and as they were first: a change would make every stored page a stranger."""
    seed = hashlib.sha256(b"hicache-ext chain v1\0" + bytes(8) + bytes(8)).digest()
    assert chain.seed() == seed
    assert seed.hex() == "a5b6832da2a16726ca4582ae86e119eaf867a5f9d870d059e77cd3b2ed7567ec"
    first = hashlib.sha256(seed + b"".join(n.to_bytes(4, "little") for n in (1, 2, 3, 70000))).digest()
    second = hashlib.sha256(first + b"".join(n.to_bytes(4, "little") for n in (5, 6, 7, 8)) + b"image@0").digest()
    keys = chain.extend(seed, [1, 2, 3, 70000, 5, 6, 7, 8, 9], 4, extra={1: b"image@0"})
    assert split_keys(keys) == [first, second]
    assert second.hex() == "c909615bb4e298c2bc040f16637aa3e9be628c3ecc6a649d5d4f253ebd1219e9"
    assert chain.seed("tenant", "adapter").hex() == "78985b50185ba449b676cc298d2347daeba18cf2e1f5634d0df339fe8a3c42f5"


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_salts_and_adapters_never_meet(salt: str, lora: str, other_salt: str, other_lora: str) -> None:
    same = (salt, lora) == (other_salt, other_lora)
    assert (chain.seed(salt, lora) == chain.seed(other_salt, other_lora)) == same


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 5), st.integers(0, 10))
def test_a_chain_continued_is_the_chain_at_once(tokens: list[int], page: int, cut: int) -> None:
    whole = chain.extend(chain.seed(), tokens, page)
    head = chain.extend(chain.seed(), tokens[: cut * page], page)
    before = head[-KEY_BYTES:] or chain.seed()
    assert head + chain.extend(before, tokens[cut * page :], page, cut) == whole
    assert len(whole) == len(tokens) // page * KEY_BYTES


def test_no_token_id_is_cut_short() -> None:
    with pytest.raises(OverflowError):
        chain.extend(chain.seed(), [2**32], 1)


def request(*features: tuple[str, int, int], **fields: object) -> SimpleNamespace:
    """A vLLM request of 64 equal tokens. features: identifier, offset, length."""
    return SimpleNamespace(
        all_token_ids=[7] * 64, prompt_token_ids=[7] * 64,
        mm_features=[
            SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))
            for name, offset, length in features
        ],
        **fields,
    )  # fmt: skip


def keys(asked: SimpleNamespace, page: int = 16) -> list[bytes]:
    found = RequestChain.of(asked, page, Adapters())
    assert found is not None
    return split_keys(found.keys(4))


def test_images_under_the_same_placeholders_never_meet() -> None:
    plain, cat, dog = keys(request()), keys(request(("cat", 20, 8))), keys(request(("dog", 20, 8)))
    assert cat[0] == dog[0] == plain[0], "what comes before the image is shared"
    assert len({cat[1], dog[1], plain[1]}) == len({cat[3], dog[3], plain[3]}) == 3
    assert keys(request(("cat", 21, 8)))[1] != cat[1], "the place counts"
    across = keys(request(("cat", 30, 4)))
    assert across[0] == plain[0]
    assert across[1] != plain[1]
    two = keys(request(("cat", 16, 4), ("dog", 20, 4)))
    assert two[1] != keys(request(("dog", 16, 4), ("cat", 20, 4)))[1]


def test_salts_seed_a_request() -> None:
    assert keys(request(cache_salt="a")) != keys(request(cache_salt="b")) != keys(request())
    assert keys(request(cache_salt="a")) == keys(request(cache_salt="a"))


def test_what_cannot_be_named_has_no_keys() -> None:
    assert RequestChain.of(request(prompt_embeds=object()), 16, Adapters()) is None


def test_an_adapter_counts_by_content_until_its_files_change(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name, content in (("one", "A"), ("same", "A"), ("other", "B")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(content)

    def adapter(name: str, number: int) -> SimpleNamespace:
        return SimpleNamespace(lora_int_id=number, lora_path=str(tmp_path / name))

    known = Adapters()
    one = known.content(adapter("one", 1))
    assert one is not None
    assert one == known.content(adapter("same", 2)) != known.content(adapter("other", 3))
    (tmp_path / "one" / "adapter_config.json").write_text("changed")
    assert known.content(adapter("one", 1)) is None
    assert RequestChain.of(request(lora_request=adapter("one", 1)), 16, known) is None
    assert known.content(adapter("same", 2)) == one
