"""The s3 tier: pages as objects of a bucket, through obstore.

Belongs here: which requests move pages, and what their answers mean. Does not belong here: the bytes of an object
(object.py), HTTP (http.py).

An object's key is `prefix/version/namespace/key`, in hex. A read is one GET; a write is a HEAD, and then a PUT on
condition that nobody was faster (If-None-Match), or without condition where HEAD found an object of another size. Large
objects go up in parts, which become one object at the end or never.

A page is first tried over a connection of ours, between socket and page (http.py). What does not go well there is asked
of obstore, which repeats, follows redirections and knows what errors mean; so is everything that is not a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from storage_backends.backoff import Backoff
from storage_backends.base import BackendOptions, Buffers, Capabilities, Dispatcher
from storage_backends.object_backend import Group, ObjectBackend, TooLate, Unreachable
from storage_backends.s3.client import open_store
from storage_backends.s3.http import Answer, Http
from storage_backends.s3.options import S3Options
from storage_backends.wire import WireError, WireTimeout

_PARTS_AT_ONCE = 4
_DELETE_AT_ONCE = 1000
#: What obstore gathers of an answer before it hands it over: it is copied from there into the page, and nowhere else.
_CHUNK = 4 << 20
#: Objects up to this size are gathered whole.
_AT_ONCE = 16 << 20
#: For which an address is signed: it is used at once, but clocks differ.
_SIGNED_FOR = timedelta(minutes=15)
#: Answers that tell all; any other is for obstore to make out.
_UNDERSTOOD = {"GET": (200, 404), "PUT": (200, 412)}
#: How long obstore alone is asked after a request of ours that did not go well: at first, and at most.
_DETOUR_SECONDS = (1.0, 60.0)
_NOBODY_FASTER = b"If-None-Match: *\r\n"


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
        self._http = Http(options.timeout, options.tls_ca) if Http.is_possible(options.endpoint) else None
        self._detour = Backoff(*_DETOUR_SECONDS)
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
            name, head = self.name(group, page), bytearray(group.form.head_bytes)
            buffers = [memoryview(head), *group.batch.buffers(page)]
            with _errors():
                size = self._get(name, buffers)
            if size == -1:
                self.absent(group, page)
            elif size == group.form.size:
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

    def stats(self) -> Mapping[str, int | float | str]:
        """direct: pages that went between socket and memory. repeated: those for which obstore was asked after all."""
        with self._count_lock:
            ways = {name: self.counts[name] for name in ("direct", "repeated")}
        return {**super().stats(), **ways}

    def abort(self) -> None:
        if self._http is not None:
            self._http.abort()

    def close(self) -> None:
        super().close()
        self._heads.shutdown(wait=False, cancel_futures=True)
        if self._http is not None:
            self._http.close()

    def _direct(self, method: Literal["GET", "PUT"], name: str, ask: Callable[[Http, str], Answer]) -> Answer | None:
        """The answer to a request of ours; None where obstore has to be asked."""
        if self._http is None or not self._detour.allow():
            return None
        try:
            answer = ask(self._http, obstore.sign(self._store, method, name, _SIGNED_FOR))
        except WireTimeout as error:
            raise TooLate(str(error)) from None
        except WireError:
            answer = None
        if self._closing:
            raise TooLate("closed")
        if answer is not None and answer.status in _UNDERSTOOD[method]:
            self._detour.good()
            self.count("direct")
            return answer
        self._detour.bad("")
        self.count("repeated")
        return None

    def _get(self, name: str, buffers: Buffers) -> int:
        """The object's size, -1 where there is none. It is in the buffers if it has exactly their size."""
        answer = self._direct("GET", name, lambda http, url: http.get(url, buffers))
        if answer is not None:
            return answer.length if answer.status == 200 else -1
        try:
            found = obstore.get(self._store, name)
        except FileNotFoundError:
            return -1
        size, wanted = int(found.meta["size"]), sum(map(len, buffers))
        if size == wanted:
            # In one piece, since each call costs more than a copy; in several where that is large.
            whole = self._fill(buffers, [found.bytes()] if size <= _AT_ONCE else found.stream(_CHUNK))
            return size if whole else 0
        return size

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
        condition = b"" if replace else _NOBODY_FASTER
        answer = self._direct("PUT", name, lambda http, url: http.put(url, parts, condition))
        if answer is not None:
            return answer.status == 200
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
