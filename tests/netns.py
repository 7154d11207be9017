"""Hosts for tests: network namespaces on one virtual switch, each with a loopback and an address of its own.

Belongs here: hosts, their links, what runs on them. Does not belong here: what a test lets run there.

A namespace lives as long as a process that holds it, and that one dies with the test run: nothing is left behind,
whatever becomes of the run. No namespace of these has a way to the machine's own network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.child import die_with_parent

_CLONE_NEWNET = 0x40000000
_NET = "10.213.0."


class Host:
    """A network namespace with loopback up. address: its own on a `Network`, else of the loopback.

    Skips the test where namespaces cannot be made.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        missing = [tool for tool in ("ip", "unshare", "nsenter", "tc") if shutil.which(tool) is None]
        if missing or os.geteuid() != 0:
            pytest.skip(f"network namespaces need root{f' and {missing[0]}' if missing else ''}")
        self.address = address
        self._children: list[subprocess.Popen[Any]] = []
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], preexec_fn=die_with_parent)
        mine = os.readlink("/proc/self/ns/net")
        until = time.monotonic() + 10
        while os.readlink(f"/proc/{self._holder.pid}/ns/net") == mine:
            if self._holder.poll() is not None or time.monotonic() > until:
                self.close()
                pytest.skip("network namespaces are not allowed here")
            time.sleep(0.005)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """Of the process that holds the namespace: for `ip link set ... netns PID`."""
        return self._holder.pid

    def command(self, *words: str) -> list[str]:
        """This command line, run on this host."""
        return ["nsenter", "--net", "--target", str(self.pid), *words]

    def run(self, *words: str) -> str:
        """Run to the end; stdout. AssertionError when it failed."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def popen(self, *words: str, **how: Any) -> subprocess.Popen[Any]:
        """Start it; killed with the host. `how` goes to subprocess.Popen."""
        child = subprocess.Popen(self.command(*words), preexec_fn=die_with_parent, **how)
        self._children.append(child)
        return child

    def python(self, *words: str, **how: Any) -> subprocess.Popen[Any]:
        """This interpreter, in the repository's root."""
        return self.popen(sys.executable, *words, cwd=Path(__file__).parent.parent, **how)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this host meanwhile, and so is every thread and process that it starts."""
        libc = ctypes.CDLL(None, use_errno=True)
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            assert libc.setns(there, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert libc.setns(back, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            os.close(there)
            os.close(back)

    def slow(self, device: str, rate: str) -> None:
        """What leaves through this device ("lo", "eth0") does so at `rate` ("80mbit"); "" lifts that."""
        if rate:
            self.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "128kb",
                     "latency", "200ms")  # fmt: skip
        else:
            self.run("tc", "qdisc", "del", "dev", device, "root")

    def kill(self) -> None:
        """Every process on this host dies at once; the kernel still tells their peers."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()

    def close(self) -> None:
        self.kill()
        self._holder.kill()
        self._holder.wait()
        for child in self._children:
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _pids(self) -> list[int]:
        """Processes on this host that come from this test run, other than the holder and ourselves."""
        try:
            home = os.readlink(f"/proc/{self.pid}/ns/net")
        except OSError:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/net") == home:
                    found.append(int(entry.name))
        return [pid for pid in found if pid not in (self.pid, os.getpid())]


class Network:
    """`hosts` hosts on one switch: 10.213.0.1, .2 and so on, device eth0 of each."""

    def __init__(self, hosts: int) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            self._switch = self._stack.enter_context(Host())
            self._switch.run("ip", "link", "add", "switch", "type", "bridge")
            self._switch.run("ip", "link", "set", "switch", "up")
            self.hosts = [self._stack.enter_context(Host(f"{_NET}{i + 1}")) for i in range(hosts)]
            for i, host in enumerate(self.hosts):
                port = f"port{i}"
                self._switch.run(
                    "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)
                )
                self._switch.run("ip", "link", "set", port, "master", "switch", "up")
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
                host.run("ip", "link", "set", "eth0", "up")
            undo.pop_all()

    def unplug(self, host: Host) -> None:
        """Nothing reaches this host any more, and nothing that it sends arrives: its peers hear no end of anything."""
        self._switch.run("ip", "link", "set", f"port{self.hosts.index(host)}", "down")

    def plug(self, host: Host) -> None:
        """The host is on the switch again."""
        self._switch.run("ip", "link", "set", f"port{self.hosts.index(host)}", "up")

    def vanish(self, host: Host) -> None:
        """The host loses its power: its link first, so that nobody is told, then everything that runs there."""
        self.unplug(host)
        host.kill()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
