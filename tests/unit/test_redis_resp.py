"""The small RESP reader: what a server sends, in whatever pieces, is understood or refused, and nothing overruns."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("redis")

from storage_backends.redis.resp import ReplyError, Resp, command, command_around
from storage_backends.wire import WireError, WireTimeout

CUTS = st.lists(st.integers(1, 9000), max_size=6)


class Peer:
    """A wire and its other end, which sends `data` in pieces and closes."""

    def __init__(self, data: bytes, cuts: list[int], timeout: float = 5, close: bool = True) -> None:
        ours, self.theirs = socket.socketpair()
        self.wire = Resp(ours, timeout, None)
        self._thread = threading.Thread(target=self._send, args=(data, cuts, close))
        self._thread.start()

    def _send(self, data: bytes, cuts: list[int], close: bool) -> None:
        try:
            for cut in cuts:
                self.theirs.sendall(data[:cut])
                data = data[cut:]
            self.theirs.sendall(data)
        except OSError:
            return
        if close:
            self.theirs.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Resp:
        return self.wire

    def __exit__(self, *_: object) -> None:
        self.wire.close()
        self._thread.join()
        self.theirs.close()


Reply = bytes | int | str | None
"""A value, a number, an error's text, no value."""

REPLIES = st.lists(st.one_of(st.binary(max_size=20_000), st.none(), st.integers(), st.just("OOM no")), max_size=6)


def encoded(reply: Reply) -> bytes:
    match reply:
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case int():
            return b":%d\r\n" % reply
        case str():
            return b"-%b\r\n" % reply.encode()
        case _:
            return b"$-1\r\n"


@settings(deadline=None, max_examples=60)
@given(REPLIES, CUTS)
def test_replies_are_read_back_however_they_are_cut(replies: list[Reply], cuts: list[int]) -> None:
    with Peer(b"".join(map(encoded, replies)), cuts) as wire:
        for reply in replies:
            if isinstance(reply, int):
                assert wire.reply() == reply
                continue
            size = len(reply) if isinstance(reply, bytes) else 4
            memory = bytearray(b"\xee" * size)
            got = wire.value_into([memoryview(memory)[: size // 3], memoryview(memory)[size // 3 :]])
            if isinstance(reply, bytes):
                assert (got, memory) == (size, reply)
            elif reply is None:
                assert got == -1
            else:
                assert isinstance(got, ReplyError)
                assert (str(got), got.kind) == (reply, "OOM")
        with pytest.raises(WireError):
            wire.reply()


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(st.binary(max_size=9000), st.text("$:+-0123456789\r\nab", max_size=60).map(str.encode)),
    CUTS,
    st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_anything_at_all_is_an_answer_or_a_wire_error(data: bytes, cuts: list[int], asked: list[bool]) -> None:
    memory = bytearray(b"\xee" * 300)
    with Peer(data, cuts) as wire:
        try:
            for value in asked:
                if value:
                    wire.value_into([memoryview(memory)[100:150], memoryview(memory)[170:200]])
                else:
                    wire.reply()
        except WireError:
            pass
    assert memory[:100] + memory[150:170] + memory[200:] == b"\xee" * 220


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(0, 100))
def test_a_value_of_another_size_is_read_past(size: int, room: int) -> None:
    memory = bytearray(b"\xee" * room)
    with Peer(b"$%d\r\n%b\r\n:7\r\n" % (size, b"x" * size), []) as wire:
        assert wire.value_into([memoryview(memory)]) == size
        assert wire.reply() == 7
    assert memory == (b"x" if size == room else b"\xee") * room


@pytest.mark.parametrize("data", [b"", b"$10", b"$10\r\nabc", b":1"])
def test_silence_is_a_timeout(data: bytes) -> None:
    with Peer(data, [], timeout=0.1, close=False) as wire, pytest.raises(WireTimeout):
        wire.value_into([memoryview(bytearray(10))]) if data[:1] == b"$" else wire.reply()


def test_commands() -> None:
    assert command("GET", b"a\0") == b"*2\r\n$3\r\nGET\r\n$2\r\na\0\r\n"
    before, after = command_around(("SET", "k"), 5, ("EX", "9"))
    assert before + b"12345" + after == b"*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n12345\r\n$2\r\nEX\r\n$1\r\n9\r\n"
