"""How an attention kernel packs a block: found out by letting it store numbers that tell where they went.

CPU kernels order the elements of a block as their instruction set likes it, and do not say how. But they only move
them, so the order can be asked for, once, on a block of our own.

Belongs here: asking, and checking the answer. Does not belong here: what is done with it (sharing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Bits of an element's number that one question finds out: every element type here holds these integers exactly.
_BITS = 7

Store = Callable[[Any, Any, Any, Any], None]
"""(key, value: [tokens, heads, dim]; cache: [blocks, heads, tokens, 2 * dim]; slots: int64[tokens])."""


def learn(store: Store, dtype: Any, heads: int, dim: int, tokens: int) -> Any | None:
    """int64[2, tokens, heads, dim]: where in a block each element of K and V is; None where the kernel does more than
    move them."""
    import torch

    size = tokens * heads * dim

    def stored(key: Any, value: Any) -> Any | None:
        """The block of these elements; None where another block was touched."""
        cache = torch.zeros(2, heads, tokens, 2 * dim, dtype=dtype)
        store(key.view(tokens, heads, dim), value.view(tokens, heads, dim), cache, torch.arange(tokens, 2 * tokens))
        return None if cache[0].count_nonzero() else cache[1].flatten()

    numbers = torch.arange(2 * size)  # of every element: K's, then V's
    found = torch.zeros(2 * size, dtype=torch.int64)
    for shift in range(0, (2 * size - 1).bit_length(), _BITS):
        digits = ((numbers >> shift) & ((1 << _BITS) - 1)).to(dtype)
        block = stored(digits[:size], digits[size:])
        if block is None or not torch.equal(block, block.round().clamp(0, (1 << _BITS) - 1)):
            return None
        found |= block.to(torch.int64) << shift
    places = torch.empty_like(found)
    if not torch.equal(found.sort().values, numbers):
        return None
    places[found] = numbers
    # Numbers were moved; now any bits, signs and fractions: nothing is scaled or rounded.
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2 * size, generator=generator).to(dtype)
    block = stored(values[:size], values[size:])
    if block is None or not torch.equal(block[places], values):
        return None
    return places.view(2, tokens, heads, dim)
