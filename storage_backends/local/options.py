"""Options of the local tier: what a configuration may say, and whether it can work on this machine.

Belongs here: the keys, their checks, and the admission rule that they ask for. Does not belong here: anything that
opens the tier (backend.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, PlainValidator, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from storage_backends.base import BackendOptions, OptionError
from storage_backends.local.device import home_of, usable_bytes
from storage_backends.local.policy import DEFAULT, Admission, Always, SecondHit, WriteBudget
from storage_backends.local.rules import Duration, NamespaceRule, Rules

_MIN_CAPACITY = 1 << 20
#: Refused pages that second-hit admission remembers at most, for each namespace.
_REMEMBERED = 1 << 18
#: The index has 32 bits for a folder, of which 24 are its number on the disk.
_MOST_DISKS = 255


def _one_or_list(kind: Any) -> PlainValidator:
    """A value of this kind, or a list of such values; what is wrong is said of the key, not of a kind of value."""
    adapter = TypeAdapter(kind)

    def validate(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError("an empty list")
        try:
            if isinstance(value, (list, tuple)):
                return tuple(adapter.validate_python(item) for item in value)
            return adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise PydanticCustomError(first["type"], "{problem}", {"problem": first["msg"]}) from error

    return PlainValidator(validate)


class LocalOptions(BackendOptions):
    """path: directory on the disk, or a list of them, one on each disk; a raw block device will do as well. capacity:
    bytes for all processes that use them together; of several, in equal parts, or a list of as many. metadata: where
    devices have their locks and logs, in a directory named as the device.

    engine: what moves the bytes ("auto": the best that works here). sqpoll: a kernel thread for each ring takes the
    requests, and spins while there are any: CPU for latency. iopoll: completions are polled for, where the device has
    polled queues (nvme.poll_queues); tried first, and left off where it does not work. Both are the native engine's,
    and left off with a line in the log where "auto" takes another. eviction: the order in which pages go when room is
    short, always the ends of chains first. admission: which pages are worth a write once the tier is full
    ("second_hit": those offered before, "write_budget": as many as write_bytes_per_day pay for). ttl: time to live of
    pages, from when they were stored ("24h"; never, if not given). namespaces: rules for single namespaces, of which
    the first that matches counts (rules.py).
    """

    path: Annotated[Path | tuple[Path, ...], _one_or_list(Path)]
    capacity: Annotated[ByteSize | tuple[ByteSize, ...], _one_or_list(Annotated[ByteSize, Field(ge=_MIN_CAPACITY)])]
    metadata: Path | None = None
    engine: Literal["auto", "native", "liburing", "threads"] = "auto"
    sqpoll: bool = False
    iopoll: bool = False
    eviction: Literal["credit", "lru", "s3fifo"] = DEFAULT  # type: ignore[assignment]
    admission: Literal["always", "second_hit", "write_budget"] = "always"
    write_bytes_per_day: ByteSize | None = Field(default=None, gt=0)
    ttl: Duration = None
    namespaces: tuple[NamespaceRule, ...] = ()

    @model_validator(mode="after")
    def _budget_has_a_size(self) -> LocalOptions:
        if (self.admission == "write_budget") != (self.write_bytes_per_day is not None):
            raise ValueError("admission: write_budget and write_bytes_per_day go together; give both or neither")
        return self

    @model_validator(mode="after")
    def _polling_is_native(self) -> LocalOptions:
        if (self.sqpoll or self.iopoll) and self.engine not in ("auto", "native"):
            raise ValueError(
                f"sqpoll and iopoll are the native engine's; use engine: native or auto, not {self.engine}"
            )
        return self

    @model_validator(mode="after")
    def _each_disk_has_a_capacity(self) -> LocalOptions:
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        if len(paths) > _MOST_DISKS:
            raise ValueError(f"path: {len(paths)} disks; at most {_MOST_DISKS} can be told apart")
        if isinstance(self.capacity, tuple) and len(self.capacity) != len(paths):
            raise ValueError(
                f"capacity: {len(self.capacity)} values for {len(paths)} paths; give one for each, or one for all"
            )
        return self

    @property
    def places(self) -> list[tuple[Path, int]]:
        """Path and capacity (bytes) of each disk."""
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        if isinstance(self.capacity, tuple):
            return list(zip(paths, map(int, self.capacity), strict=True))
        return [(path, int(self.capacity) // len(paths)) for path in paths]

    @property
    def total(self) -> int:
        """Bytes of all disks."""
        return sum(capacity for _, capacity in self.places)

    @property
    def names(self) -> str:
        return ", ".join(str(path) for path, _ in self.places)

    def rules(self) -> Rules:
        return Rules(self.namespaces, self.ttl)


def check(options: LocalOptions) -> None:
    """Raise OptionError for places that cannot hold the tier. Changes nothing."""
    distinct(options)
    wanted: dict[int, int] = {}
    room: dict[int, int] = {}
    for path, capacity in options.places:
        home = _home(path, options.metadata)
        if home != path:
            _check_device(path, home, capacity)
            continue
        place = nearest(path)
        if not place.is_dir():
            raise OptionError("path", str(path), f"{place} is not a directory", "name a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise OptionError("path", str(path), f"{place} is not writable for this user", "chown it, or name another")
        disk, device = os.statvfs(place), os.stat(place).st_dev
        room.setdefault(device, disk.f_bavail * disk.f_frsize)
        room[device] += sum(extent.stat().st_size for extent in path.glob("w*/e*.ext"))
        wanted[device] = wanted.get(device, 0) + capacity
    for device, capacity in wanted.items():
        if capacity > room[device]:
            raise OptionError(
                "capacity", ByteSize(capacity).human_readable(),
                f"the disk has {ByteSize(room[device]).human_readable()}",
                "lower it, or name a directory on a larger disk",
            )  # fmt: skip


def _home(path: Path, metadata: Path | None) -> Path:
    try:
        return home_of(path, metadata)
    except OSError as error:
        raise OptionError(
            "path", str(path), error.strerror or str(error), "name a device that is there, or a directory"
        ) from error


def _check_device(path: Path, home: Path, capacity: int) -> None:
    if not os.access(path, os.R_OK | os.W_OK):
        raise OptionError("path", str(path), "may not be read and written by this user", "chown it, or name another")
    place = nearest(home)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OptionError(
            "metadata", str(home), f"{place} is no directory that this user may write", "chown it, or name another"
        )
    room = usable_bytes(path)
    if capacity > room:
        raise OptionError(
            "capacity", ByteSize(capacity).human_readable(), f"{path} has {ByteSize(room).human_readable()}",
            "lower it, or name a larger device",
        )  # fmt: skip


def distinct(options: LocalOptions) -> None:
    """Raise OptionError for a path that cannot be one, or is the same directory as another."""
    seen: dict[Path, Path] = {}
    for path, _ in options.places:
        if "\0" in str(path):
            raise OptionError("path", str(path), "holds a NUL character", "remove it")
        real = Path(os.path.realpath(path))
        if real in seen:
            raise OptionError("path", str(path), f"is the same directory as {seen[real]}", "list each directory once")
        seen[real] = path


def nearest(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    while not os.path.exists(path) and path != path.parent:  # unlike Path's, false where it may not look
        path = path.parent
    return path


def admission(options: LocalOptions, slot_bytes: int) -> Admission:
    """A rule for pages of this size; asked only when the tier is full."""
    if options.admission == "second_hit":
        return SecondHit(max(1, min(_REMEMBERED, options.total // slot_bytes)))
    if options.write_bytes_per_day is not None:
        # A quiet time saves up at most an hour's bytes, so that a burst is no day's wear.
        return WriteBudget(options.write_bytes_per_day, max(options.write_bytes_per_day / 24, slot_bytes))
    return Always()
