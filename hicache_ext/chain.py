"""The chain of page keys that belongs to no engine: sha256 over token ids, seeded with salt and LoRA adapter.

    seed = sha256(domain, length and bytes of the salt, length and bytes of the adapter's content id)
    H_i  = sha256(H_(i-1), tokens of page i as u32 little-endian, extra of page i);  H_(-1) is the seed

`extra` is empty but for pages with content that token ids do not tell (images under placeholder tokens). All pages have
the same number of tokens, so where the extra begins is never in doubt.

Belongs here: keys from tokens. Does not belong here: an engine's requests, or what else a page's identity needs
(page.Namespace).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

from hicache_ext.page import KEY_BYTES

_DOMAIN = b"hicache-ext chain v1\0"
_TOKEN = "I" if array("I").itemsize == 4 else "L"
_NO_EXTRA: Mapping[int, bytes] = {}


def seed(salt: str = "", lora: str = "") -> bytes:
    """32 bytes before the first page. salt: the request's. lora: what tells the adapter's content."""
    digest = hashlib.sha256(_DOMAIN)
    for part in (salt, lora):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def extend(
    before: bytes, tokens: Sequence[int], page_size: int, first: int = 0, extra: Mapping[int, bytes] = _NO_EXTRA
) -> bytes:
    """Packed keys (n x 32 bytes) of the n whole pages of `tokens`, which follow the page (or seed) `before`.

    first: number of the first of these pages in its sequence. extra: bytes by page number in the sequence.
    Raises OverflowError for a token id that is no u32.
    """
    return extend_raw(before, array(_TOKEN, tokens).tobytes(), page_size, first, extra)


def extend_raw(
    before: bytes, raw: bytes, page_size: int, first: int = 0, extra: Mapping[int, bytes] = _NO_EXTRA
) -> bytes:
    """As extend, of tokens that are u32le already."""
    width = page_size * 4
    keys = []
    for page in range(len(raw) // width):
        more = extra.get(first + page)
        body = before + raw[page * width : (page + 1) * width]
        before = hashlib.sha256(body if more is None else body + more).digest()
        keys.append(before)
    assert len(before) == KEY_BYTES
    return b"".join(keys)
