"""Finds backends by name: the entry point group `hicache_ext.storage_backends`, or `module:Class` written out.

Does not belong here: opening a backend, or knowing which ones exist.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from storage_backends.base import Backend, OptionError

GROUP = "hicache_ext.storage_backends"


def names() -> list[str]:
    """The installed backends' names, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def backend_class(name: str) -> type[Backend]:
    """The backend class called `name`. OptionError where there is none, or it does not import."""
    target = next((entry.value for entry in entry_points(group=GROUP) if entry.name == name), name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise OptionError("type", name, "no such backend", f"one of {', '.join(names())}, or module:Class of your own")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's own raises when it is imported
        raise OptionError("type", name, f"does not import: {error}", "install the extra that it needs") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise OptionError("type", name, "is not a storage_backends.base.Backend", "name a subclass of it")
    return found
