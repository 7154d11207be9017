"""A mutator that knows nothing of coverage: for interpreters without atheris, and for the short run of every test.

Does not belong here: what an input means (targets.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
_LONGEST = 1 << 14


def corpus(target: str) -> dict[str, bytes]:
    """The seeds of a target by file name."""
    return {file.name: file.read_bytes() for file in sorted((CORPUS / target).iterdir())}


def mutations(target: str, tokens: Sequence[bytes], seed: int = 1) -> Iterator[bytes]:
    """Inputs without end, the same ones for the same seed."""
    chance = random.Random(f"{target} {seed}")
    seeds = list(corpus(target).values())
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(1 << chance.randrange(5)):
            _mutate(data, chance, seeds, tokens)
        yield bytes(data[:_LONGEST])


def _mutate(data: bytearray, chance: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    # Half of all changes go where formats keep their numbers: to the front.
    reach = min(len(data), 256) if chance.random() < 0.5 else len(data)
    at = chance.randrange(reach + 1)
    length = min(len(data) - at, 1 << chance.randrange(9))
    match chance.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(data):
            data[at] = chance.randrange(256)
        case 2:
            token = chance.choice(tokens)
            data[at : at + len(token)] = token
        case 3:
            data[at:at] = chance.choice(tokens)
        case 4:
            del data[at : at + length]
        case 5:
            data[at:at] = data[at : at + length]
        case 6:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at:] = other[start:]
        case _:
            data[at:at] = chance.randbytes(length)
