"""A SGLang server as a child process: start it, wait for it, ask it, stop it for certain.

What belongs here: the process and its HTTP interface. What does not: which flags a command passes and what it
does with the answers.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ServerFailed(RuntimeError):
    """The server died or never came up; the message names the log and ends with its last lines."""


@dataclass(frozen=True)
class Answer:
    """One completed request. Times are seconds from sending; `device`, `host`, `storage` count cached tokens."""

    tokens: list[int]
    first_token_s: float
    total_s: float
    prompt_tokens: int
    device: int
    host: int
    storage: int


def free_port() -> int:
    """A TCP port that nobody listens on now, and that the kernel gives to no outgoing connection meanwhile."""
    try:
        lowest = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32768
    ours = [random.randrange(lowest - 10_000, lowest) for _ in range(50)] if lowest > 12_000 else []
    for port in [*ours, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(errno.EADDRINUSE, "no TCP port is free on 127.0.0.1")


def _wait_until_gone(group: int, limit_s: float) -> None:
    """Waits for a process group to have no running member. Zombies do not count: nobody may be there to reap them."""
    end = time.monotonic() + limit_s
    while _running(group) and time.monotonic() < end:
        time.sleep(0.05)


def _running(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the command's name, which may hold anything: state, parent, process group.
            state, _, member_of = stat.read_text(errors="replace").rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue  # it ended meanwhile
        if int(member_of) == group and state not in "ZX":
            return True
    return False


@dataclass
class Server:
    """A server process in a session of its own: stopping it reaches the schedulers that it starts."""

    command: Sequence[str]
    log: Path
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, patience_s: float = 30.0, grace_s: float = 10.0) -> None:
        """SIGTERM; SIGKILL for the launcher after `patience_s` and for what it leaves behind after `grace_s` more."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        # Schedulers may outlive the launcher; a leftover one would hold the port, memory and the store.
        group = self.process.pid
        _wait_until_gone(group, grace_s)
        self._signal(signal.SIGKILL)
        self.process.wait()
        _wait_until_gone(group, grace_s)
        self.process = None

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def failed(self, what: str) -> ServerFailed:
        """An error that shows the end of the log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return ServerFailed("\n".join([f"{what}; its log is {self.log} and ends:", *lines[-15:]]))

    def wait_until_up(self, limit_s: float, on_wait: Callable[[float], None] = lambda seconds: None) -> float:
        """Seconds that it took. Calls `on_wait(seconds so far)` meanwhile. Raises ServerFailed."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < limit_s:
            self.check_alive()
            try:
                if self.get("/health", timeout_s=5)[0] == 200:
                    return waited
            except (OSError, http.client.HTTPException):
                pass
            on_wait(waited)
            time.sleep(0.25)
        raise self.failed(f"the server was not up after {limit_s:.0f} s")

    def check_alive(self) -> None:
        """Raises ServerFailed if the process has ended."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            raise self.failed(f"the server ended with code {code}")

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def generate(self, prompt: list[int], new_tokens: int, timeout_s: float = 300.0) -> Answer:
        """One greedy request of token ids, streamed so that the first token has a time. Raises ServerFailed."""
        body = {
            "input_ids": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        begin = time.perf_counter()
        try:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise self.failed(f"a request was answered with {response.status}: {response.read()[:500]!r}")
            return self._read_stream(response, begin)
        except (OSError, http.client.HTTPException) as error:
            self.check_alive()
            raise self.failed(f"a request failed: {error!r}") from error
        finally:
            connection.close()

    def _read_stream(self, response: http.client.HTTPResponse, begin: float) -> Answer:
        first = None
        last: dict[str, Any] = {}
        tokens: list[int] = []
        while line := response.readline():
            text = line.strip().removeprefix(b"data:").strip()
            if not text:
                continue
            if text == b"[DONE]":
                break
            last = json.loads(text)
            if "error" in last:
                raise self.failed(f"a request was refused: {last['error']}")
            if last.get("output_ids"):
                first = first or time.perf_counter()
                # Some versions send all tokens so far, others only the new ones.
                so_far = last["output_ids"]
                whole = len(so_far) >= last["meta_info"]["completion_tokens"]
                tokens = so_far if whole else tokens + so_far
        if first is None:
            raise self.failed("a request was answered without a token")
        meta = last["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return Answer(
            tokens=tokens,
            first_token_s=first - begin,
            total_s=time.perf_counter() - begin,
            prompt_tokens=meta["prompt_tokens"],
            device=details.get("device", 0),
            host=details.get("host", 0),
            storage=details.get("storage", 0),
        )

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels; 0 while it does not exist."""
        status, text = self.get("/metrics")
        if status != 200:
            return 0.0
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " "))
        )
