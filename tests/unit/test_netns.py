"""Hosts of tests: apart from this machine, joined to each other, killed and unplugged."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from hicache_ext.cli.serving import free_port
from tests.netns import Host, Network

_SERVE = "import socket; s = socket.create_server(('0.0.0.0', {port})); print('up', flush=True)\nwhile 1: s.accept()"


def _serving(host: Host, port: int) -> None:
    child = host.python("-c", _SERVE.format(port=port), stdout=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 0.3).close()
    except OSError:
        return False
    return True


def _becomes_reachable(host: str, port: int) -> bool:
    """The kernel looks at links that came up once a second."""
    until = time.monotonic() + 20
    while not (reached := _reachable(host, port)) and time.monotonic() < until:
        time.sleep(0.05)
    return reached


def test_a_host_is_apart_and_threads_inside_inherit_it() -> None:
    port = free_port()
    with Host() as host:
        _serving(host, port)
        assert not _reachable("127.0.0.1", port)
        seen: list[bool] = []
        with host.inside():
            thread = threading.Thread(target=lambda: seen.append(_reachable("127.0.0.1", port)))
            thread.start()
            thread.join()
            assert _reachable("127.0.0.1", port)
        assert seen == [True]
        assert not _reachable("127.0.0.1", port)
        host.kill()
        with host.inside():
            assert not _reachable("127.0.0.1", port)


def test_hosts_meet_on_a_network_until_one_is_unplugged() -> None:
    port = free_port()
    with Network(2) as network:
        near, far = network.hosts
        _serving(far, port)
        with near.inside():
            assert _becomes_reachable(far.address, port)
            near.slow("eth0", "80mbit")
            assert _becomes_reachable(far.address, port)
            near.slow("eth0", "")
            network.unplug(far)
            with pytest.raises(TimeoutError):
                socket.create_connection((far.address, port), 0.3)
            network.plug(far)
            assert _becomes_reachable(far.address, port)
            network.vanish(far)
            assert not _reachable(far.address, port)
