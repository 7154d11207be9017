"""Which index a tier uses: the native one where it is built, else the Python one. Decided once, at open.

Belongs here: the choice. Does not belong here: what an index does (index.py, csrc/index).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from storage_backends.local.index import Index

if TYPE_CHECKING:
    from storage_backends.local.index_native import NativeIndex

AnyIndex: TypeAlias = "Index | NativeIndex"

#: Environment variable that names the index ("python", "native"), for tests and for finding faults.
VARIABLE = "HICACHE_EXT_INDEX"


def open_index(order: str) -> AnyIndex:
    """order: a name of storage_backends.local.policy.ORDERS. `name` of the result says which index it is."""
    if os.environ.get(VARIABLE) == "python":
        return Index(order)
    try:
        from storage_backends.local.index_native import NativeIndex
    except ImportError:  # no compiler at installation, or a build from before the index
        if os.environ.get(VARIABLE) == "native":
            raise
        return Index(order)
    return NativeIndex(order)
