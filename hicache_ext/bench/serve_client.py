"""Requests to a serving engine over HTTP: streamed, timed, many at a time; a failure is a reply that says why.

Belongs here: connections, threads, clocks. Does not belong here: what an engine's requests and answers look like
(hicache_ext.bench.serve_engines) or what is asked (hicache_ext.bench.serve).

The client must not be what is measured. Bodies are encoded before the clock starts, and while a stream runs its lines
are only kept with the time at which they came: nothing is parsed before the request is over.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

_ERROR_CHARACTERS = 300


class EngineError(RuntimeError):
    """The engine cannot be asked, or cannot do what was asked of it; the message is one line."""


@dataclass(frozen=True)
class Body:
    """A request, encoded. path: where it is posted."""

    path: str
    content: bytes


@dataclass(frozen=True)
class Parsed:
    """What a stream said. tokens: output ids. first: number of the line that brought the first of them.

    cached: prompt tokens that were not computed, by where they lay: "device", "host", "storage".
    """

    tokens: list[int]
    first: int
    prompt_tokens: int
    cached: dict[str, int] = field(default_factory=dict)


class Format(Protocol):
    """How an engine wants to be asked, and how it answers."""

    def body(self, prompt: Sequence[int], new_tokens: int) -> Body:
        """A greedy request of token ids that is streamed and ends after exactly `new_tokens`."""

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """ValueError where the lines are no complete answer."""


@dataclass(frozen=True)
class Reply:
    """One request. Times are seconds from sending; error: empty, or why there is no answer (and the rest is empty)."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    cached: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def per_token_s(self) -> float | None:
        """Seconds between output tokens after the first; None for a single one."""
        return (self.total_s - self.first_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


class Client:
    """Talks to one URL. timeout_s: the longest silence of the engine that is waited for."""

    def __init__(self, url: str, timeout_s: float = 300.0, api_key: str = "") -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise EngineError(f"{url!r} is no URL: {error}. Fix: write http://HOST:PORT") from error
        if parts.scheme not in ("http", "https") or not host:
            raise EngineError(f"{url!r} is no URL of a server. Fix: write http://HOST:PORT")
        self.url = url.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._base = host, port, parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, method: str, path: str, timeout_s: float | None = None) -> tuple[int, str]:
        """Status and body of a plain request. Raises EngineError when there is no answer."""
        connection = self._connect(timeout_s)
        try:
            connection.request(method, self._base + path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.url}{path}: {_why(error)}") from error
        finally:
            connection.close()

    def stream(self, body: Body, form: Format) -> Reply:
        """Send one request and read its answer to the end; never raises for what the engine or the network does."""
        connection = self._connect(None)
        lines: list[bytes] = []
        times: list[float] = []
        begin = time.perf_counter()
        try:
            connection.request("POST", self._base + body.path, body.content, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(_ERROR_CHARACTERS).decode("utf-8", "replace")
                return Reply(error=f"{self.url}{body.path}: status {response.status}: {' '.join(said.split())}")
            while line := response.readline():
                if len(line) > 2:  # more than the line break between two events
                    times.append(time.perf_counter())
                    lines.append(line)
            end = time.perf_counter()
            said_all = form.parse(lines)
        except ValueError as error:
            return Reply(error=f"{self.url}{body.path}: {error}")
        except (OSError, http.client.HTTPException) as error:
            return Reply(error=f"{self.url}{body.path}: {_why(error)}")
        finally:
            connection.close()
        first = times[said_all.first] - begin
        return Reply(said_all.tokens, first, end - begin, said_all.prompt_tokens, said_all.cached)

    def closed_loop(self, bodies: Sequence[Body], form: Format, concurrency: int) -> tuple[list[Reply], float]:
        """`concurrency` requests under way at a time until all are answered; replies in order, seconds for all."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            replies = list(pool.map(lambda body: self.stream(body, form), bodies))
        return replies, time.perf_counter() - begin

    def open_loop(self, bodies: Sequence[Body], form: Format, at_s: Sequence[float]) -> tuple[list[Reply], float]:
        """Each request at its own time, whatever became of those before; replies in order, seconds for all."""
        begin = time.perf_counter()

        def at_its_time(body: Body, due: float) -> Reply:
            time.sleep(max(0.0, begin + due - time.perf_counter()))
            return self.stream(body, form)

        with ThreadPoolExecutor(max(1, len(bodies))) as pool:
            replies = list(pool.map(at_its_time, bodies, at_s))
        return replies, time.perf_counter() - begin

    def _connect(self, timeout_s: float | None) -> http.client.HTTPConnection:
        return self._kind(self._host, self._port, timeout=timeout_s or self._timeout_s)


def _why(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "no answer in time"
        case ConnectionRefusedError():
            return "connection refused: no server listens there"
        case _:
            return f"{type(error).__name__}: {error}"
