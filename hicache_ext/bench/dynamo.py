"""Dynamo's services for measurements: started apart from the machine's network, asked over HTTP, weighed.

Belongs here: the namespace, the process, requests. Does not belong here: what is measured.

Dynamo's services listen on every address that they find and ask nobody who they are. So a measurement that starts one
begins again in a network namespace of its own, which has a loopback and no way out; event streams are `ipc://` there.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

_START_SECONDS = 60.0
_APART = "HICACHE_EXT_APART"
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


class Unavailable(RuntimeError):
    """The service cannot be started, or does not answer; the message says how to help."""


class Service:
    """A running service at this address; pid: where it was started here."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url, self.pid = url, pid
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)  # TCP_NODELAY is on

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer as JSON, as text where it is none. OSError: nobody answers, or refuses."""
        data = None if body is None else json.dumps(body)
        try:
            self._connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            self._connection.close()
            raise OSError(f"{self.url}: {error!r}") from error
        except OSError:
            self._connection.close()
            raise
        if answer.status >= 400:
            self._connection.close()  # the service may do so as well, and would be heard of with the next request
            raise OSError(f"{method} {self.url}{path}: {answer.status} {text}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    def up(self) -> bool:
        try:
            self.ask("GET", "/health")
        except OSError:
            return False
        return True

    def memory(self) -> int | None:
        """Resident bytes of the process; None where it was not started here."""
        if self.pid is None:
            return None
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float | None:
        """Seconds of CPU that the process has used; None where it was not started here."""
        if self.pid is None:
            return None
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def service(url: str, module: str, port: int, threads: int = 2) -> Iterator[Service]:
    """The service at `url`; "": Dynamo's `module`, started on this port, in a namespace that `apart` has entered."""
    if url:
        found = Service(url)
        if not found.up():
            raise Unavailable(f"{url} does not answer. Fix: python -m {module} --port {urlsplit(url).port or port}")
        yield found
        return
    words = [sys.executable, "-m", module, "--port", str(port), "--threads", str(threads)]
    env = {**os.environ, "DYN_LOG": os.environ.get("DYN_LOG", "error")}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet, env=env)
    try:
        found = Service(f"http://127.0.0.1:{port}", process.pid)
        until = time.monotonic() + _START_SECONDS
        while not found.up():
            if process.poll() is not None or time.monotonic() > until:
                raise Unavailable(f"{module} did not start. Fix: look at what `{' '.join(words[1:])}` says")
            time.sleep(0.05)
        yield found
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def apart(module: str, option: str) -> None:
    """Be in a network namespace of this command's own: begins the command again there, and does not return.

    module: what will be started there. option: the one that names a running service in its place, for the error.
    """
    if os.environ.get(_APART) == os.readlink("/proc/self/ns/net"):
        return
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise Unavailable(f"{module} is not installed. Fix: pip install --no-deps ai-dynamo-runtime==1.6.1")
    running = f"Fix: start `python -m {module}` yourself, where nobody else reaches it, and name it with {option}"
    if shutil.which("unshare") is None:
        raise Unavailable(f"{module} listens on every address, and `unshare` is not here to keep it apart. {running}")
    new = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--"]
    tried = subprocess.run([*new, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise Unavailable(
            f"{module} listens on every address, and a namespace is refused: {tried.stderr.strip()}. {running}"
        )
    code = "from hicache_ext.bench import dynamo; dynamo._begin()"
    os.execvp(new[0], [*new, sys.executable, "-c", code, *sys.orig_argv])


def _begin() -> None:
    """In the new namespace: the loopback up, and the command again."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))
    os.environ[_APART] = os.readlink("/proc/self/ns/net")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
