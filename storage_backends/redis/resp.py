"""RESP over a wire: as much of the protocol as pages need (RESP2:
https://redis.io/docs/latest/develop/reference/protocol-spec/).

Belongs here: commands and replies as bytes. Does not belong here: the socket (wire.py), connecting, authenticating, TLS
(servers.py), or what a reply means.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage_backends.wire import Wire, WireError

#: A value of another length than asked for is read past up to this size; beyond, the connection is given up.
_SKIP = 16 << 20


class ReplyError(Exception):
    """The server's answer to one command is an error, as it says it: "OOM ...", "MOVED 3999 host:port"."""

    @property
    def kind(self) -> str:
        return str(self).partition(" ")[0]


def command(*words: str | bytes) -> bytes:
    """One command with its arguments."""
    return b"*%d\r\n" % len(words) + b"".join(map(_word, words))


def command_around(before: Sequence[str], payload: int, after: Sequence[str] = ()) -> tuple[bytes, bytes]:
    """A command with `payload` bytes among its arguments: what to send before and after those bytes."""
    count = b"*%d\r\n" % (len(before) + 1 + len(after))
    return count + b"".join(map(_word, before)) + b"$%d\r\n" % payload, b"\r\n" + b"".join(map(_word, after))


def _word(word: str | bytes) -> bytes:
    raw = word.encode() if isinstance(word, str) else word
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


class Resp(Wire):
    """A wire to a Redis server."""

    def reply(self) -> int | bytes | ReplyError:
        """The next reply, of a command that is answered by a status, a number or an error. Raises WireError."""
        line = self.line(self.deadline())
        match line[:1]:
            case b":":
                return _number(line)
            case b"+":
                return line[1:]
            case b"-":
                return ReplyError(line[1:].decode(errors="replace"))
        raise WireError(f"an answer that begins with {line[:1]!r} where none such was due")

    def value_into(self, buffers: Sequence[memoryview]) -> int | ReplyError:
        """The next reply, a value: into the buffers if it has exactly their size. Raises WireError.

        Its size; -1 where there is none. One of another size has been read past, and the buffers are untouched.
        """
        deadline = self.deadline()
        line = self.line(deadline)
        if line[:1] == b"-":
            return ReplyError(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise WireError(f"an answer that begins with {line[:1]!r} where a value was due")
        size = _number(line)
        if size == -1:
            return -1
        tail = memoryview(bytearray(2))
        if size == sum(map(len, buffers)):
            self.fill([*buffers, tail], deadline)
        elif 0 <= size <= _SKIP:
            self.fill([memoryview(bytearray(size)), tail], deadline)
        else:
            raise WireError(f"a value of {size} bytes where one of {sum(map(len, buffers))} was due")
        if tail != b"\r\n":
            raise WireError("a value without an end")
        return size


def _number(line: bytes) -> int:
    try:
        return int(line[1:])
    except ValueError:
        raise WireError(f"{line[1:21]!r} where a number was due") from None
