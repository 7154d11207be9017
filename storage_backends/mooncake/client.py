"""Mooncake's process as this one sees it: started, asked, ended, and started again.

Belongs here: the life of the process and of its lanes. Does not belong here: what goes on in it (process.py), pages.
"""

from __future__ import annotations

import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_backends.mooncake.memory import Region, Regions
from storage_backends.mooncake.options import MooncakeOptions
from storage_backends.mooncake.process import MESSAGE
from storage_backends.object_backend import TooLate, Unreachable

_PROGRAM = Path(__file__).with_name("process.py")
#: Mooncake takes some seconds to connect; after these it is not waited for any more.
_START_SECONDS = 30.0
_END_SECONDS = 2.0
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0


class Process:
    """One run of Mooncake's process. Raises Unreachable where it does not come up.

    name: of Mooncake's, as others reach it. lanes: how many may ask at once.
    """

    def __init__(self, options: MooncakeOptions, segment: int, lanes: int) -> None:
        self._timeout = options.timeout
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(lanes)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        fds = [lane.fileno() for lane in theirs]
        self._control, self._lanes = ours[0], lanes - 1
        self._control_lock = threading.RLock()
        self._placed: list[tuple[Region, int]] = []
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._gone = False
        for lane in ours[1:]:
            self._free.put(lane)
        told = {
            "fds": fds,
            "parent": os.getpid(),
            "host": options.host or way_to(options.address),
            "metadata": options.metadata,
            "segment": segment,
            "protocol": options.protocol,
            "devices": options.devices,
            "master": options.master,
            "replicas": options.replicas,
        }
        try:
            with open(options.log or os.devnull, "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_PROGRAM), json.dumps(told)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(options),
                    pass_fds=fds, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            for lane in ours:
                lane.close()
            raise Unreachable(f"mooncake's process: {error}") from None
        finally:
            for lane in theirs:
                lane.close()
        self.regions = Regions(())

    def wait_ready(self) -> None:
        """Until it has reached the master. Raises Unreachable, and it has ended then."""
        try:
            self._control.settimeout(_START_SECONDS)
            message = self._control.recv(MESSAGE)
        except OSError:
            message = b""
        told = json.loads(message) if message else {"code": -1, "problem": "it did not reach the master in time"}
        if told["code"]:
            self.kill()
            problem = told.get("problem") or f"its setup failed ({told['code']}); the option `log` tells more"
            raise Unreachable(f"mooncake: {problem}")

    def share(self, regions: list[Region]) -> list[Region]:
        """Let it use these regions as well; those that Mooncake does not take."""
        refused = []
        with self._control_lock:
            for region in regions:
                request = {"do": "map", "size": region.length, "offset": region.offset}
                address = self._ask(self._control, request, _START_SECONDS, region.fd).get("address", -1)
                if address > 0:
                    self._placed.append((region, address))
                else:
                    refused.append(region)
            self.regions = Regions(self._placed)
        return refused

    def ask(self, request: dict[str, Any]) -> list[int]:
        """Mooncake's codes. Raises TooLate and Unreachable; in both cases the process has ended by then."""
        try:
            lane = self._free.get(timeout=self._timeout)
        except queue.Empty:
            raise TooLate("mooncake: too many requests are waiting") from None
        try:
            answer = self._ask(lane, request, self._timeout)
        finally:
            self._free.put(lane)
            if self._gone:
                self._close()
        if "problem" in answer:
            raise RuntimeError(answer["problem"])
        codes: list[int] = answer["codes"]
        return codes

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Until it has ended, whoever ended it."""
        self._process.wait()

    def kill(self) -> None:
        """End it. Afterwards nothing that it was asked for is under way."""
        self._process.kill()
        self._process.wait()
        self._gone = True
        self._close()
        with self._control_lock:
            self._control.close()

    def end(self) -> None:
        """Let it say good-bye to the master, so that its segment is not looked for any more; not for long, though."""
        try:
            if self._free.qsize() == self._lanes and self.alive():
                with self._control_lock:
                    self._control.send(json.dumps({"do": "end"}).encode())
                self._process.wait(_END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def _ask(self, lane: socket.socket, request: dict[str, Any], seconds: float, *fds: int) -> dict[str, Any]:
        try:
            lane.settimeout(seconds)
            socket.send_fds(lane, [json.dumps(request).encode()], fds)
            message = lane.recv(MESSAGE)
        except TimeoutError:
            self.kill()
            raise TooLate(f"mooncake: no answer within {seconds:g} s; its process was ended") from None
        except OSError:
            message = b""
        if not message:
            self.kill()
            raise Unreachable("mooncake: its process has ended")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _close(self) -> None:
        """The lanes that nobody is reading from: a number that is closed may be another file's the next moment."""
        while True:
            try:
                self._free.get_nowait().close()
            except queue.Empty:
                return


class Client:
    """A process that is kept running: started in the background, again when it has ended, later each time.

    ready: called with each new process before anybody else gets it.
    """

    def __init__(
        self, options: MooncakeOptions, segment: int = 0, lanes: int = 1,
        ready: Callable[[Process], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._options, self._segment, self._lanes, self._ready = options, segment, lanes, ready
        self.problem = "mooncake: connecting"
        self.starts = 0
        self._process: Process | None = None
        self._starting: Process | None = None
        self._tried = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name="mooncake-keeper", daemon=True)
        self._keeper.start()

    def process(self) -> Process:
        """The process that runs; the first start is waited for, others are not. Raises Unreachable."""
        self._tried.wait(self._options.timeout)
        process = self._process
        if process is None or not process.alive():
            raise Unreachable(self.problem)
        return process

    def running(self) -> Process | None:
        """As process, for who can do without."""
        return self._process

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            process, starting = self._process, self._starting
        if starting is not None:
            starting.kill()
        if process is None:
            return
        if self._segment:
            process.end()
        else:
            process.kill()  # nobody has anything of it
        self._keeper.join(_END_SECONDS)

    def _keep(self) -> None:
        wait = _FIRST_WAIT
        while not self._closing.is_set():
            try:
                self._process = process = self._start()
            except (Unreachable, TooLate, OSError) as error:
                self.problem = str(error)
                self._tried.set()
                self._closing.wait(wait * random.uniform(0.5, 1.0))
                wait = min(_LONGEST_WAIT, 2 * wait)
                continue
            wait = _FIRST_WAIT
            self._tried.set()
            if self._closing.is_set():
                process.kill()
            process.wait()
            self._process = None
            self.problem = "mooncake: connecting again"

    def _start(self) -> Process:
        _reach(self._options)
        process = Process(self._options, self._segment, self._lanes)
        with self._lock:
            self._starting = process
        try:
            if self._closing.is_set():
                raise Unreachable("closed")
            process.wait_ready()
            self._ready(process)
        except BaseException:
            process.kill()
            raise
        finally:
            with self._lock:
                self._starting = None
        self.starts += 1
        return process


def _reach(options: MooncakeOptions) -> None:
    """Raise Unreachable where nobody listens: Mooncake would try for a minute and not say what is wrong."""
    try:
        socket.create_connection(options.address, min(5.0, options.timeout)).close()
    except OSError as error:
        raise Unreachable(f"{options.master}: {error}") from None


def way_to(address: tuple[str, int]) -> str:
    """This machine's address on the way there."""
    family = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.connect(address)
        found: str = one.getsockname()[0]
    return found


def _environment(options: MooncakeOptions) -> dict[str, str]:
    """Mooncake's own limits are below ours, so that it gives up single pages before its process is ended."""
    half = max(0.5, options.timeout / 2)
    ours = {
        "GLOG_minloglevel": "0" if options.log else "3",
        "MC_RPC_TIMEOUT_MS": str(int(half * 1000)),
        "MC_RPC_CONNECT_TIMEOUT_MS": str(int(half * 1000)),
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(max(1, int(half))),
        "MC_TCP_STATUS_TIMEOUT_SEC": str(max(1, int(half))),
    }
    return {**ours, **os.environ}
