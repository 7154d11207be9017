"""Pages that come as tensors under any string key: SGLang's generic interface.

SGLang 0.5.17 stores draft pages so (`<hash>.draft`), and every version does for a dynamic backend without
`interface_v1`. A key's part after the dot names its pool; tensors of one pool, dtype and size share a namespace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hicache_ext.page import Namespace, pack_keys
from storage_backends.base import PageBatch


class GenericPages:
    """Makes batches of tensors. namespace_of: (pool name, dtype, bytes) to the current namespace, None for none."""

    def __init__(self, namespace_of: Callable[[str, str, int], Namespace | None]) -> None:
        self._namespace_of = namespace_of
        self._kinds: set[tuple[str, str, int]] = set()
        self._lock = threading.Lock()

    def batch(self, keys: Sequence[str], tensors: Sequence[Any]) -> PageBatch | None:
        """The batch of these contiguous tensors, or None when they are not of one kind or have no namespace."""
        kinds = {_kind(key, tensor) for key, tensor in zip(keys, tensors, strict=True)}
        if len(kinds) != 1 or not all(tensor.is_contiguous() for tensor in tensors):
            return None
        pool, dtype, size = kinds.pop()
        space = self._namespace_of(pool, dtype, size) if size else None
        if space is None:
            return None
        with self._lock:
            self._kinds.add((pool, dtype, size))
        return PageBatch(
            space,
            pack_keys(keys),
            None,
            np.fromiter((tensor.data_ptr() for tensor in tensors), np.uint64, len(tensors)),
            np.full(len(tensors), size, np.uint64),
            np.arange(len(tensors) + 1, dtype=np.int64),
            tensors,
        )

    def spaces(self, key: str) -> list[Namespace]:
        """The namespaces in which this key may be: of every kind of tensor seen for its pool so far."""
        with self._lock:
            kinds = [kind for kind in self._kinds if kind[0] == pool_of(key)]
        return [space for kind in kinds if (space := self._namespace_of(*kind)) is not None]


def pool_of(key: str) -> str:
    """The pool that a key names: "draft" for `<hash>.draft`, "kv" for a bare hash."""
    return key.rsplit(".", 1)[1] if "." in key else "kv"


def _kind(key: str, tensor: Any) -> tuple[str, str, int]:
    return pool_of(key), str(tensor.dtype).removeprefix("torch."), int(tensor.numel() * tensor.element_size())
