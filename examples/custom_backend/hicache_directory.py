"""Pages as files of a directory: a storage backend of one's own, whole.

A file holds 16 bytes of digest, keyed with the page's identity, and the page: a page that is filed under another's
name is no more a page than one with a flipped bit.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from hicache_ext.page import Namespace
from storage_backends import base
from storage_backends.base import Buffers, KeyBatch, Outcome, Residency
from storage_backends.presence import Presence

DIGEST = 16


class DirectoryOptions(base.BackendOptions):
    """path: where the files go. Nothing removes old ones."""

    path: Path


class DirectoryBackend(base.BlockingBackend):
    Options = DirectoryOptions
    capabilities = base.Capabilities(persistent=True, shared=True, medium="EXTERNAL")
    options: DirectoryOptions

    def __init__(self, options: DirectoryOptions, dispatcher: base.Dispatcher) -> None:
        super().__init__(options, dispatcher)
        options.path.mkdir(parents=True, exist_ok=True)  # an OSError: tried again in the background
        self._seen = Presence()

    def _file(self, namespace: Namespace, key: bytes) -> Path:
        return self.options.path / namespace.digest.hex() / key.hex()

    def has(self, namespace: Namespace, key: bytes) -> bool:
        there = self._file(namespace, key).exists()
        (self._seen.seen if there else self._seen.gone)(namespace.digest, [key])
        return there

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return self._seen.lookup(batch)  # no I/O: a scheduler may be waiting

    def get(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        try:
            with self._file(namespace, key).open("rb", buffering=0) as file:
                digest = file.read(DIGEST)
                whole = all(file.readinto(buffer) == len(buffer) for buffer in buffers)
        except FileNotFoundError:
            self._seen.gone(namespace.digest, [key])
            return Outcome.MISS
        if whole and digest == _digest(namespace, key, buffers):
            return Outcome.HIT
        self.delete(namespace, key)  # so that the next write heals it
        return Outcome.CORRUPT

    def put(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        file = self._file(namespace, key)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name(f".{file.name}.{os.urandom(4).hex()}")
            with partial.open("wb") as out:
                out.writelines([_digest(namespace, key, buffers), *buffers])
            partial.rename(file)  # readers see a whole page or none
            self.report(Residency.STORED, namespace.digest, key)
        self._seen.seen(namespace.digest, [key])
        return Outcome.HIT

    def delete(self, namespace: Namespace, key: bytes) -> bool:
        self._seen.gone(namespace.digest, [key])
        try:
            self._file(namespace, key).unlink()
        except FileNotFoundError:
            return False
        self.report(Residency.REMOVED, namespace.digest, key)
        return True

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        for namespace in namespaces:
            self._seen.forget(namespace.digest)
            shutil.rmtree(self.options.path / namespace.digest.hex(), ignore_errors=True)

    def stats(self) -> Mapping[str, int | float | str]:
        return {"pages": len(self._seen), "errors": self.errors}


def _digest(namespace: Namespace, key: bytes, buffers: Buffers) -> bytes:
    hashed = hashlib.blake2b(key=namespace.digest + key, digest_size=DIGEST)
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.digest()
