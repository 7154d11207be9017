"""KV events of the storage tiers in vLLM's own stream, through the connector's `take_events`.

Belongs here: what vLLM calls a block, its event classes, its flushes, and the thread that keeps events ready. Does not
belong here: what must be said (events.announcer), or where changes come from (events.watch).

    backends' reports -> announcer -> [thread] -> ready events -> take_events, on the scheduler's thread

A block's name is that of vLLM's own events, so a router follows a prompt from the device to the tiers. Its hashes are
chained from a seed that is the same in every process (unless `--prefix-caching-hash-algo` is xxhash and PYTHONHASHSEED
is not set), so names that are kept with the pages hold after a restart.

Announced are plain prompts only: of blocks with a salt, an adapter or images the event would need more than the pages
keep. vLLM publishes with its steps: while an engine is idle what changed waits for the next request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from vllm import envs
from vllm.distributed import kv_events

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored
from hicache_ext.events.watch import Watch
from hicache_ext.page import KEY_BYTES
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from storage_backends.base import Notes, Residency

logger = logging.getLogger(__name__)

_READY_BLOCKS, _TAKEN_BLOCKS, _COMPOSED = 16384, 2048, 128
_TURN_SECONDS, _BUSY_SECONDS, _CLOSE_SECONDS = 0.2, 0.02, 2.0
_LOW_64 = (1 << 64) - 1


class TierEvents:
    """One for each scheduler. Composes on a thread of its own; the scheduler's only moves what is ready."""

    def __init__(self, store: TieredStore | FaultyStore, served: Callable[[], bytes | None]) -> None:
        """served: as Watch's."""
        self.announcer = Announcer()
        self._wake = threading.Event()
        self._watch = Watch(store, self.announcer, served, self._wake.set)
        self._ready: deque[tuple[int, Any]] = deque()
        self._blocks = 0  # in ready events
        self._lock = threading.Lock()
        self._pool: Any = None
        self._cached: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hicache-events", daemon=True)
        self._thread.start()

    def follow(self, pool: Any) -> None:
        """vLLM's pool of blocks: its flushes make consumers forget the tiers as well."""
        self._pool, self._cached = pool, pool.cached_block_hash_to_block

    def hear(self, changes: Iterable[tuple[int, Residency, bytes, bytes, Notes | None]]) -> None:
        """What a worker in another process saw become of pages on servers: see WorkerReport."""
        for change in changes:
            self._watch.hear(*change)

    def take(self) -> list[Any]:
        """vLLM's events of what has become of the tiers' pages. The scheduler's thread."""
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._cached:
            # A flush: vLLM has just said AllBlocksCleared, so all is to be said again.
            self._cached = self._pool.cached_block_hash_to_block
            with self._lock:
                self._ready.clear()
                self._blocks = 0
                self.announcer.clear()
            self._wake.set()
            return []
        if not self._ready:
            return []
        taken, count = [], 0
        with self._lock:
            while self._ready and count < _TAKEN_BLOCKS:
                blocks, event = self._ready.popleft()
                count += blocks
                taken.append(event)
            self._blocks -= count
        self._wake.set()
        return taken

    def know(self, namespace: bytes, request: Any, keys: bytes, first: int, last: int, page_size: int) -> Notes | None:
        """These pages of a request are on their way, to a tier or from one; what events say of them. keys: packed, from
        the first one."""
        notes = notes_of(request, first, last, page_size)
        if notes is not None:
            self.announcer.know(namespace, keys[first * KEY_BYTES : last * KEY_BYTES], notes)
        return notes

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        self._watch.close()

    def _run(self) -> None:
        turn, said = 0.0, False
        while not self._closed:
            self._wake.wait(max(0.0, turn - time.monotonic()))
            self._wake.clear()
            try:
                # What a tier reports is said at once; the tiers are asked when their turn comes, however much they say.
                if time.monotonic() >= turn:
                    turn = time.monotonic() + _TURN_SECONDS
                    if self._watch.turn():
                        turn = time.monotonic() + _BUSY_SECONDS
                self._compose()
            except Exception:
                if not said and not self._closed:
                    said = True
                    logger.exception("KV events of the storage tiers: a turn failed (said once)")

    def _compose(self) -> None:
        """Make events ready, as many as there is room for."""
        while self._blocks < _READY_BLOCKS and not self._closed:
            with self._lock:  # so that a flush comes before or after all of this
                for event in self.announcer.take(_COMPOSED):
                    blocks = len(event.block_hashes) if isinstance(event, BlockStored | BlockRemoved) else 1
                    self._blocks += blocks
                    self._ready.append((blocks, _as_vllm(event)))
            if self.announcer.quiet:
                return
            time.sleep(0)  # the engine's threads first


def notes_of(request: Any, first: int, last: int, page_size: int) -> Notes | None:
    """What events say of these pages of a plain request, pages being vLLM's blocks; None where they say nothing."""
    if getattr(request, "cache_salt", None) or request.lora_request is not None or request.mm_features:
        return None
    hashes: Sequence[bytes] = request.block_hashes
    if len(hashes) < last:
        return None
    names = [int.from_bytes(one[-8:], "big", signed=True) for one in hashes[max(0, first - 1) : last]]
    before = names[:-1] if first else [0, *names[:-1]]
    tokens = np.asarray(request.all_token_ids[first * page_size : last * page_size], np.uint32)
    return Notes(tokens.reshape(-1, page_size), np.array([names[-len(before) :], before], np.int64).T)


def objection(hash_block_size: int | None, block_size: int, page_size: int) -> str:
    """Why no events of the tiers can join vLLM's; "" where they can."""
    if not envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES:
        return "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is off"
    if page_size != block_size or hash_block_size not in (None, block_size):
        return f"pages have {page_size} tokens, vLLM's events are of blocks of {hash_block_size or block_size}"
    return ""


def _as_vllm(event: AnyEvent) -> Any:
    if isinstance(event, BlockStored):
        parent = event.parent_block_hash
        return kv_events.BlockStored(
            block_hashes=[block & _LOW_64 for block in event.block_hashes],
            parent_block_hash=None if parent is None else parent & _LOW_64,
            token_ids=event.token_ids,
            block_size=event.block_size,
            lora_id=None,
            medium=event.medium,
            lora_name=None,
        )
    assert isinstance(event, BlockRemoved)
    return kv_events.BlockRemoved(block_hashes=[block & _LOW_64 for block in event.block_hashes], medium=event.medium)
