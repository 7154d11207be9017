"""The last line of defence: nothing that the adapter raises may reach SGLang's threads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def answers(default: Callable[..., Any]) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Wrap a public method: whatever it raises is counted, said once per kind, and answered with default(args)."""

    def wrap(method: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Answer:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                kind = f"error_{method.__name__}_{type(error).__name__}"
                self.counters.once(kind, logging.ERROR, "%s failed: %r", method.__name__, error)
                logger.debug("%s failed", method.__name__, exc_info=True)
                answer: Answer = default(*args, **kwargs)
                return answer

        return guarded

    return wrap


def none_of(keys: Sequence[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


def none_of_transfers(transfers: Sequence[Any], *_: Any, **__: Any) -> dict[str, list[bool]]:
    return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}
