"""A server of somebody else's, as a child process of a test: waited for, stopped, killed."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import time


class Child:
    """Subclasses set `port`, and `process` when they start it. name: what it is called when it does not come up."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None

    def wait_until_up(self, seconds: float, pause: float) -> None:
        """Until the port takes connections."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, f"{self.name} ended"
                time.sleep(pause)
        raise AssertionError(f"{self.name} did not start")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop_answering(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def answer_again(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def die_with_parent() -> None:
    """For Popen's preexec_fn: the child is killed when the test run ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
