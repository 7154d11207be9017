"""The token ids of pages on their way to storage.

SGLang hands token ids to the controller's `write_storage` and only hashes to the backend. The plugin notes them here,
on the scheduler thread and in constant time per 128 pages; the backup thread takes them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Pages per call of the backend (SGLang's STORAGE_BATCH_SIZE): a backup of more pages comes in batches of this size.
BATCH_PAGES = 128
#: Batches remembered. One that was never taken (a backup that SGLang dropped) is forgotten by age.
BATCHES = 4096


@dataclass(frozen=True)
class Noted:
    """One batch's tokens: `key` is SGLang's token sequence, `start` the first token of the batch."""

    key: Any
    start: int

    @property
    def is_plain(self) -> bool:
        """Whether the page hash is the event hash: no salt, no LoRA, no bigrams."""
        return not (
            getattr(self.key, "extra_key", None)
            or getattr(self.key, "cache_salt", None)
            or getattr(self.key, "is_bigram", False)
        )

    def pages(self, count: int, page_size: int) -> NDArray[np.uint32] | None:
        """uint32[count, page_size], or None where the sequence has other tokens than plain ids."""
        if getattr(self.key, "is_bigram", False):
            return None
        raw = getattr(self.key, "raw_token_ids", None)
        ids = raw() if raw is not None else getattr(self.key, "token_ids", self.key)
        chosen = np.asarray(ids[self.start : self.start + count * page_size])
        if chosen.shape != (count * page_size,) or chosen.dtype.kind not in "iu":
            return None
        if len(chosen) and (chosen.min() < 0 or chosen.max() > 0xFFFFFFFF):
            return None
        return chosen.astype(np.uint32).reshape(count, page_size)


class TokenNotes:
    """Tokens by the first page hash of each batch. Bounded; thread-safe."""

    def __init__(self, limit: int = BATCHES) -> None:
        self._limit = limit
        self._notes: OrderedDict[str, Noted] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, hashes: Sequence[str], key: Any, page_size: int) -> None:
        """Remember the tokens of one backup operation."""
        with self._lock:
            for page in range(0, len(hashes), BATCH_PAGES):
                self._notes[hashes[page]] = Noted(key, page * page_size)
            while len(self._notes) > self._limit:
                self._notes.popitem(last=False)

    def take(self, first: str) -> Noted | None:
        """The tokens of the batch that begins with this page, once."""
        with self._lock:
            return self._notes.pop(first, None)

    def __len__(self) -> int:
        return len(self._notes)


def event_hashes(keys: bytes, parents: bytes) -> NDArray[np.int64]:
    """int64[n, 2] of 32-byte page hashes and their parents': the first 8 bytes, signed, as KV events carry them.

    An unknown parent (zeroes) stays 0.
    """
    columns = [np.frombuffer(packed, ">i8")[::4] for packed in (keys, parents)]
    return np.stack(columns, axis=1).astype(np.int64)
