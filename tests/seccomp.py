"""Runs a command under a seccomp filter that forbids io_uring, as container runtimes do. Needs no root.

    python -m tests.seccomp errno|kill COMMAND...

errno: the three system calls fail with EPERM (Docker's and containerd's profiles). kill: they end the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_IO_URING = (425, 426, 427)  # setup, enter, register: the same numbers on every architecture
_RET_ALLOW, _RET_ERRNO, _RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_io_uring(punishment: int) -> None:
    """From here on, in this process and its children. OSError where the kernel has no seccomp filters."""
    steps = [(_LOAD_WORD, 0, 0, 0)]  # the system call's number
    for i, number in enumerate(_IO_URING):
        steps.append((_JUMP_EQUAL, len(_IO_URING) - i, 0, number))
    steps += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, punishment)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), code)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    forbid_io_uring({"errno": _RET_ERRNO | errno.EPERM, "kill": _RET_KILL_PROCESS}[sys.argv[1]])
    os.execvp(sys.argv[2], sys.argv[2:])
