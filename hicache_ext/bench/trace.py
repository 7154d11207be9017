"""A trace of requests in Mooncake's format, turned once into arrays on disk, so that replays hold none of it in memory.

Belongs here: reading and checking the format, page identities, when each page is used next. Does not belong here:
policies and what a replay measures (hicache_ext.bench.replay).

One JSON object a line: `timestamp` (milliseconds), `input_length` (tokens), `hash_ids` (one id per block of 512 tokens,
equal ids standing for equal prefixes); further keys are ignored. A page is a block that the prompt fills: engines store
full pages only, and of the blocks that a prompt ends in almost none is ever asked for again. A page is named by its id
and all ids before it, so that every trace is a forest, whatever its ids mean.

    tokens.bin    int64   prompt tokens of each request
    times.bin     float64 seconds
    offsets.bin   int64   where the chain of each request starts in pages.bin; one more than requests
    pages.bin     int64   identities, request after request, root first
    next.bin      int64   the request that uses the same page next; NEVER
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK_TOKENS = 512
NEVER = np.iinfo(np.int64).max
#: Beyond this a number is an error, and would not fit the arrays.
_MOST = 1 << 53
_FLUSH = 1 << 16
#: Pages sorted at a time when uses are linked, and requests read at a time: bound the memory.
_LINK_PAGES, _READ_REQUESTS = 1 << 23, 4096


class TraceError(ValueError):
    """A trace cannot be read; the message names file and line."""


class _Column:
    """Numbers on their way to a file, a few thousand at a time."""

    def __init__(self, path: Path, code: str) -> None:
        self._file: BinaryIO = path.open("wb")
        self.values: Any = array(code)

    def flush(self, least: int = 0) -> None:
        if len(self.values) > least:
            self.values.tofile(self._file)
            del self.values[:]

    def close(self) -> None:
        self.flush()
        self._file.close()


@dataclass
class Trace:
    """requests, pages: how many; distinct: the footprint; tokens: of all prompts; reusable: pages seen before."""

    folder: Path
    requests: int
    pages: int
    distinct: int
    tokens: int

    @property
    def reusable(self) -> int:
        return self.pages - self.distinct

    def __iter__(self) -> Iterator[tuple[int, float, list[int]]]:
        """(prompt tokens, seconds, chain) of each request."""
        for tokens, seconds, chain, _ in self._chunks(False):
            yield tokens, seconds, chain

    def with_next(self) -> Iterator[tuple[list[int], list[int]]]:
        """(chain, the request that uses each of its pages next) of each request."""
        for _, _, chain, following in self._chunks(True):
            yield chain, following

    def _chunks(self, linked: bool) -> Iterator[tuple[int, float, list[int], list[int]]]:
        tokens, offsets = self._map("tokens"), self._map("offsets")
        times = self._map("times", np.float64)
        pages, following = self._map("pages"), self._map("next") if linked else None
        for first in range(0, self.requests, _READ_REQUESTS):
            last = min(first + _READ_REQUESTS, self.requests)
            bounds = offsets[first : last + 1].tolist()
            base = bounds[0]
            chain = pages[base : bounds[-1]].tolist()
            after = following[base : bounds[-1]].tolist() if following is not None else []
            for i, (length, at) in enumerate(zip(tokens[first:last].tolist(), times[first:last].tolist(), strict=True)):
                start, end = bounds[i] - base, bounds[i + 1] - base
                yield length, at, chain[start:end], after[start:end]

    def _map(self, name: str, kind: type = np.int64) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        if not path.stat().st_size:
            return np.empty(0, kind)
        return np.memmap(path, kind, mode="r")


def compile_trace(
    path: Path, folder: Path, limit: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> Trace:
    """Read a trace into arrays under `folder` (an empty folder that the caller owns). limit: the first requests only.

    Raises TraceError for a line that is no request of this format, and for a trace without requests.
    """
    columns = {name: _Column(folder / f"{name}.bin", code) for name, code in _COLUMNS.items()}
    tokens, times, offsets, pages = columns.values()
    requests = total = tokens_total = 0
    offsets.values.append(0)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if requests == limit:
                    break
                if not line.strip():
                    continue
                seconds, length, ids = _request(path, number, line)
                node = 0
                for block in ids[: length // BLOCK_TOKENS]:
                    node = hash((node, block))
                    pages.values.append(node)
                requests += 1
                total += min(len(ids), length // BLOCK_TOKENS)
                tokens_total += length
                tokens.values.append(length)
                times.values.append(seconds)
                offsets.values.append(total)
                if not requests % 10_000:
                    progress(f"reading: {requests:,} requests")
                for column in columns.values():
                    column.flush(_FLUSH)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    finally:
        for column in columns.values():
            column.close()
    if not requests:
        raise TraceError(f"{path}: no requests in it")
    trace = Trace(folder, requests, total, 0, tokens_total)
    trace.distinct = _link(trace, progress)
    return trace


_COLUMNS = {"tokens": "q", "times": "d", "offsets": "q", "pages": "q"}


def _request(path: Path, number: int, line: bytes) -> tuple[float, int, list[int]]:
    def wrong(what: str) -> TraceError:
        return TraceError(f"{path}:{number}: {what}")

    try:
        request: Any = json.loads(line)
    except ValueError as error:  # covers bytes that are no UTF-8 as well
        raise wrong(f"not JSON: {error}") from error
    if not isinstance(request, dict):
        raise wrong(f"a request is an object, this is {type(request).__name__}")
    missing = [key for key in ("timestamp", "input_length", "hash_ids") if key not in request]
    if missing:
        raise wrong(f"without {', '.join(missing)}")
    time, length, ids = request["timestamp"], request["input_length"], request["hash_ids"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not abs(time) < _MOST:
        raise wrong(f"timestamp is milliseconds, not {time!r}")
    if type(length) is not int or not 0 <= length < _MOST:
        raise wrong(f"input_length is a number of tokens, not {length!r}")
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise wrong("hash_ids is a list of whole numbers")
    if len(ids) > -(-length // BLOCK_TOKENS):
        raise wrong(f"{len(ids)} hash_ids of {BLOCK_TOKENS} tokens for a prompt of {length} tokens")
    return time / 1000, length, ids


def _link(trace: Trace, progress: Callable[[str], None]) -> int:
    """Write next.bin; the number of distinct pages. Sorts one share of the identities at a time."""
    following = trace.folder / "next.bin"
    following.touch()
    if not trace.pages:
        return 0
    pages, offsets = trace._map("pages"), trace._map("offsets")
    out = np.memmap(following, np.int64, mode="w+", shape=(trace.pages,))
    shares = -(-trace.pages // _LINK_PAGES)
    distinct = 0
    for share in range(shares):
        progress(f"linking uses: {share + 1} of {shares}")
        found = []
        for start in range(0, trace.pages, _LINK_PAGES):
            piece = pages[start : start + _LINK_PAGES]
            found.append(start + np.flatnonzero(piece % shares == share))
        where = np.concatenate(found)
        names = pages[where]
        order = np.argsort(names, kind="stable")
        where, names = where[order], names[order]
        again = names[1:] == names[:-1]
        out[where] = NEVER
        out[where[:-1][again]] = np.searchsorted(offsets, where[1:][again], side="right") - 1
        distinct += len(names) - int(np.count_nonzero(again))
    out.flush()
    return distinct
