"""The s3 tier: pages as objects of a bucket, through obstore.

Belongs here: which requests move pages, and what their answers mean. Does not belong here: the bytes of an object
(object.py).

An object's key is `prefix/version/namespace/key`, in hex. A read is one GET, copied into the page as it arrives; a
write is a HEAD, and then a PUT on condition that nobody was faster (If-None-Match), or without condition where HEAD
found an object of another size. Large objects go up in parts, which become one object at the end or never.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from storage_backends.base import BackendOptions, Buffers, Capabilities, Dispatcher
from storage_backends.object_backend import Group, ObjectBackend, TooLate, Unreachable
from storage_backends.s3.client import open_store
from storage_backends.s3.options import S3Options

_PARTS_AT_ONCE = 4
_DELETE_AT_ONCE = 1000
#: What obstore gathers of an answer before it hands it over: it is copied from there into the page, and nowhere else.
_CHUNK = 4 << 20
#: Objects up to this size are gathered whole.
_AT_ONCE = 16 << 20


class S3Backend(ObjectBackend):
    """Pages in one bucket."""

    Options = S3Options
    capabilities = Capabilities(persistent=True, shared=True, native_ttl=True)
    options: S3Options
    SEPARATOR = "/"
    GROUP = 1

    def __init__(self, options: S3Options, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._store = open_store(options)
        self._heads = ThreadPoolExecutor(options.connections, thread_name_prefix="s3-head")

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        super().check(options)
        assert isinstance(options, S3Options)
        options.checked()

    def sizes(self, names: list[str]) -> list[int]:
        return [self._size(names[0])] if len(names) == 1 else list(self._heads.map(self._size, names))

    def read_group(self, group: Group) -> None:
        for page in list(group.open):
            with _errors():
                try:
                    found = obstore.get(self._store, self.name(group, page))
                except FileNotFoundError:
                    self.absent(group, page)
                    continue
                if found.meta["size"] != group.form.size:
                    group.set_corrupt(page)
                    continue
                head = bytearray(group.form.head_bytes)
                # In one piece, since each call costs more than a copy; in several where that is large.
                chunks = [found.bytes()] if group.form.size <= _AT_ONCE else found.stream(_CHUNK)
                whole = self._fill([memoryview(head), *group.batch.buffers(page)], chunks)
            if whole:
                self.arrived(group, page, head)
            else:
                group.set_corrupt(page)

    def write_group(self, group: Group) -> None:
        for page in list(group.open):
            head, buffers = group.form.prepare(group.batch, page)
            with _errors():
                if self._put(self.name(group, page), [memoryview(head), *buffers], page in group.misfits):
                    self.stored(group, page)
                else:
                    self.present(group, page)

    def delete(self, names: list[str]) -> list[bool]:
        were = [size >= 0 for size in self.sizes(names)]
        there = [name for name, was in zip(names, were, strict=True) if was]
        with _errors():
            for first in range(0, len(there), _DELETE_AT_ONCE):
                obstore.delete(self._store, there[first : first + _DELETE_AT_ONCE])
        return were

    def clear_start(self, start: str) -> None:
        with _errors():
            for found in obstore.list(self._store, prefix=start.rstrip("/"), chunk_size=_DELETE_AT_ONCE):
                obstore.delete(self._store, [one["path"] for one in found])

    def versions(self) -> dict[str, str]:
        return {"obstore": obstore.__version__}

    def close(self) -> None:
        super().close()
        self._heads.shutdown(wait=False, cancel_futures=True)

    def _fill(self, buffers: Buffers, chunks: Iterable[Any]) -> bool:
        """Copy what arrives into the buffers; whether it was exactly what they hold."""
        left = [buffer for buffer in buffers if len(buffer)]
        for chunk in chunks:
            if self._closing:
                raise TooLate("closed")
            data = memoryview(chunk)
            while len(data):
                if not left:
                    return False
                taken = min(len(left[0]), len(data))
                left[0][:taken] = data[:taken]
                data, left[0] = data[taken:], left[0][taken:]
                if not len(left[0]):
                    left.pop(0)
        return not left

    def _size(self, name: str) -> int:
        with _errors():
            try:
                return int(obstore.head(self._store, name)["size"])
            except FileNotFoundError:
                return -1

    def _put(self, name: str, parts: Buffers, replace: bool) -> bool:
        """Whether we stored it; False: somebody else just did."""
        if sum(map(len, parts)) >= self.options.multipart_size:
            # Without a condition, which uploads in parts do not have: of two writers the later one replaces a whole
            # object by a whole object of the same page.
            obstore.put(
                self._store, name, iter(parts), use_multipart=True,
                chunk_size=int(self.options.multipart_size), max_concurrency=_PARTS_AT_ONCE,
            )  # fmt: skip
            return True
        try:
            obstore.put(self._store, name, parts, mode="overwrite" if replace else "create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True


@contextmanager
def _errors() -> Iterator[None]:
    """obstore's errors as ours. Its retries are over by then."""
    try:
        yield
    except (BaseError, OSError) as error:
        said = str(error)
        first = said.partition("\n")[0][:300]
        if "kind: Timeout" in said or "TimedOut" in said:
            raise TooLate(first) from None
        raise Unreachable(first) from None
