"""What the slots of one namespace's pages have in common, for backends that hand whole batches to compiled code.

Belongs here: headers, keys and addresses of many pages at once, as arrays. Does not belong here: sealed pages
(object.py), or where slots lie.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace
from storage_backends.base import PageBatch
from storage_backends.format import SlotHeaders, SlotShape

_TEMPLATES = 64

Span = slice | list[int]
"""Some pages of a batch, as `span` gives it."""


class SlotForm:
    """shape: sizes of the slots, headers of whole blocks. lengths: uint64[buffers of a page], bytes."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.shape = SlotShape.of_namespace(namespace)
        self.lengths = np.array(namespace.layout.buffer_lengths, np.uint64)
        self._templates: dict[tuple[int | None, str, str], SlotHeaders] = {}

    def check(self, batch: PageBatch) -> None:
        """ValueError when the batch's buffers are not its namespace's: a mistake that would cut or mix pages."""
        if not np.array_equal(batch.lengths, np.tile(self.lengths, len(batch))):
            raise ValueError(f"the batch's buffers are not those of its namespace, {self.lengths.tolist()} per page")

    def addresses(self, batch: PageBatch, pages: Span) -> np.ndarray:
        """uint64[n * buffers]: where the buffers of these pages lie."""
        rows = batch.addresses.reshape(-1, len(self.lengths))
        return np.ascontiguousarray(rows[pages], np.uint64).reshape(-1)

    def headers(self, batch: PageBatch, pages: Span, rows: np.ndarray) -> None:
        """The headers of these pages, generation and checksums 0. rows: uint8[n, header bytes], written."""
        tokens = None if batch.tokens is None else batch.tokens[pages]
        kind = (None if tokens is None else tokens.shape[1], batch.salt, batch.lora)
        template = self._templates.get(kind)
        if template is None:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            template = self._templates[kind] = SlotHeaders(self.namespace, self.shape, *kind)
        count = len(rows)
        template.write(
            rows, np.arange(count), keys(batch.keys, pages),
            None if batch.parents is None else keys(batch.parents, pages), np.zeros(count, np.uint64), time.time_ns(),
            tokens, None if batch.event_hashes is None else batch.event_hashes[pages],
        )  # fmt: skip


def span(pages: Sequence[int]) -> Span:
    """An index of these pages, in their order: a slice, which copies nothing, where each follows the one before."""
    if len(pages) and list(pages) == list(range(pages[0], pages[0] + len(pages))):
        return slice(pages[0], pages[0] + len(pages))
    return list(pages)


def keys(packed: bytes, pages: Span) -> bytes:
    """These pages' 32 bytes out of a batch's."""
    if isinstance(pages, slice):
        return packed[pages.start * KEY_BYTES : pages.stop * KEY_BYTES]
    return b"".join([packed[page * KEY_BYTES : (page + 1) * KEY_BYTES] for page in pages])
