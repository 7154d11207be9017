"""The token ids of pages on their way to storage.

SGLang hands token ids to the controller's `write_storage` and only hashes to the backend. The plugin notes them here,
on the scheduler thread and in constant time per 128 pages; the backup thread takes them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Space = tuple[str | None, str | None]
"""A request's extra key and cache salt."""

#: Pages per call of the backend (SGLang's STORAGE_BATCH_SIZE): a backup of more pages comes in batches of this size.
BATCH_PAGES = 128
#: Batches remembered. One that was never taken (a backup that SGLang dropped) is forgotten by age.
BATCHES = 4096


@dataclass(frozen=True)
class Noted:
    """One batch's tokens: `key` is SGLang's token sequence, `start` the first token of the batch.

    before: the page hashes of the operation up to the batch; prefix: those before the operation, None where SGLang did
    not give them. space: the request's extra key and cache salt, None where it is not known.
    """

    key: Any
    start: int
    before: Sequence[str] = ()
    prefix: Sequence[str] | None = None
    space: Space | None = None

    @property
    def ancestors(self) -> list[str] | None:
        """The hashes of all pages before the batch, root first; None where they are not known.

        An operation without a prefix begins a prompt, or does not say: `Naming.fits` tells for its first batch.
        """
        return None if self.prefix is None and self.before else [*(self.prefix or ()), *self.before]

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

    def note(
        self, hashes: Sequence[str], key: Any, page_size: int, prefix: Sequence[str] | None = None,
        space: Space | None = None,
    ) -> None:  # fmt: skip
        """Remember the tokens of one backup operation. prefix, space: as Noted's."""
        with self._lock:
            for page in range(0, len(hashes), BATCH_PAGES):
                self._notes[hashes[page]] = Noted(key, page * page_size, hashes[:page], prefix, space)
            while len(self._notes) > self._limit:
                self._notes.popitem(last=False)

    def take(self, first: str) -> Noted | None:
        """The tokens of the batch that begins with this page, once."""
        with self._lock:
            return self._notes.pop(first, None)

    def __len__(self) -> int:
        return len(self._notes)


#: The request's extra key and cache salt, of the node that the radix cache is handing to `write_storage` right now.
_handing_over = threading.local()


def around_backup(original: Callable[..., Any], tree: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of the radix cache's write_backup_storage, which gives the controller a node's bare token ids."""
    try:
        found = tree.tree_core.prefetch_anchor_info(node)
        _handing_over.space = found if isinstance(found, tuple) else (found, None)
    except Exception:
        _handing_over.space = None
    try:
        return original(tree, node, *args, **kwargs)
    finally:
        _handing_over.space = None


def space_of(key: Any) -> Space | None:
    """The extra key and cache salt of what `write_storage` was given."""
    if hasattr(key, "extra_key"):
        return key.extra_key, getattr(key, "cache_salt", None)
    space: Space | None = getattr(_handing_over, "space", None)
    return space
