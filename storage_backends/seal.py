"""Pages sealed for tiers that are not trusted: AES-256-GCM around an object, bound to its namespace and key.

Belongs here: the seal's bytes and the cipher. Does not belong here: what is inside (object.py), or where the key comes
from (secrets.py).

    seal, 64 bytes
        0  8s  magic "HICSEAL1"        24 16s  tag
        8  u16 version                 40 24x  zeroes
       10  u16 algorithm (1 = AES-256-GCM)
       12 12s  nonce, random for every object

Everything behind the seal is encrypted, token ids included. Associated data: the seal's first 12 bytes, the namespace's
digest and the page's key, so that an object under another's name does not open.
NIST SP 800-38D allows 2^32 objects under one key with random nonces; a key should be changed before that.
"""

from __future__ import annotations

import os
import struct

from storage_backends.base import Buffers

MAGIC = b"HICSEAL1"
VERSION = 1
AES_256_GCM = 1
KEY_BYTES = 32
_SEAL = struct.Struct("<8sHH12s16s24x")
_BOUND = 12
assert _SEAL.size == 64


class Seal:
    """One key (32 bytes). ImportError where `cryptography` is not installed. Thread-safe."""

    head_bytes = _SEAL.size

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        if len(key) != KEY_BYTES:
            raise ValueError(f"a sealing key has {KEY_BYTES} bytes")
        algorithm = AES(key)
        self._encrypting = lambda nonce: Cipher(algorithm, GCM(nonce)).encryptor()
        self._decrypting = lambda nonce, tag: Cipher(algorithm, GCM(nonce, tag)).decryptor()

    def close(self, identity: bytes, head: bytearray, buffers: Buffers) -> tuple[bytearray, Buffers]:
        """Seal and encrypted head, and an encrypted copy of the buffers. identity: namespace digest and key."""
        nonce = os.urandom(12)
        bound = _SEAL.pack(MAGIC, VERSION, AES_256_GCM, nonce, bytes(16))[:_BOUND]
        cipher = self._encrypting(nonce)
        cipher.authenticate_additional_data(bound + identity)
        out = bytearray(_SEAL.size + len(head))
        cipher.update_into(head, memoryview(out)[_SEAL.size :])
        copies = []
        for buffer in buffers:
            copy = memoryview(bytearray(len(buffer)))
            cipher.update_into(buffer, copy)
            copies.append(copy)
        cipher.finalize()
        _SEAL.pack_into(out, 0, MAGIC, VERSION, AES_256_GCM, nonce, cipher.tag)
        return out, copies

    def open(self, identity: bytes, head: bytearray, buffers: Buffers) -> bytearray | None:
        """Decrypt the buffers in place; the head inside, or None where any of it is not what was sealed."""
        from cryptography.exceptions import InvalidTag

        magic, version, algorithm, nonce, tag = _SEAL.unpack_from(head)
        if (magic, version, algorithm) != (MAGIC, VERSION, AES_256_GCM) or any(head[40 : _SEAL.size]):
            return None
        cipher = self._decrypting(nonce, tag)
        cipher.authenticate_additional_data(bytes(head[:_BOUND]) + identity)
        inside = bytearray(len(head) - _SEAL.size)
        cipher.update_into(memoryview(head)[_SEAL.size :], inside)
        for buffer in buffers:
            cipher.update_into(buffer, buffer)
        try:
            cipher.finalize()
        except InvalidTag:
            return None
        return inside
