"""Pages as objects of a bucket, for NIXL's OBJ: the s3 tier's objects under the s3 tier's names.

Belongs here: everything about objects but moving their bytes. NIXL neither lists, removes nor measures objects, so the
s3 tier's client does. Does not belong here: that client.
"""

from __future__ import annotations

from itertools import count

from storage_backends.base import Dispatcher
from storage_backends.nixl.options import NixlOptions
from storage_backends.object import STEP
from storage_backends.s3.backend import S3Backend


class Named:
    """An object to move. device: the number that stands for its name at NIXL."""

    def __init__(self, device: int, name: str) -> None:
        self.device, self.name = device, name

    def publish(self, replace: bool) -> bool:
        """An upload is the page, or nothing: of two writers the later one replaces the page by the same page."""
        return True

    def changed(self) -> bool:
        return False  # objects never do

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass


class Objects:
    """Asks the bucket through obstore."""

    kind = "OBJ"
    step, pad = STEP, 1

    def __init__(self, options: NixlOptions, dispatcher: Dispatcher) -> None:
        self._bucket = S3Backend(options.s3(), dispatcher)
        self._devices = count(1)
        self.sizes, self.delete, self.clear_start = self._bucket.sizes, self._bucket.delete, self._bucket.clear_start

    def open(self, name: str, size: int) -> Named | int:
        """Not asked whether it is there: a request that would cost as much as the page's own."""
        return Named(next(self._devices), name)

    def ready(self) -> None:
        """Asked of nobody: the first upload tells."""

    def create(self, name: str, size: int) -> Named:
        return Named(next(self._devices), name)

    def full(self, size: int) -> bool:
        return False

    def touch(self, names: list[str]) -> None:
        """Objects have one time, that of their upload."""

    def close(self) -> None:
        self._bucket.close()
