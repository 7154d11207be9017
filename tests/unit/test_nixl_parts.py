"""What the nixl tier decides without NIXL: its options, which build it takes, and what makes room."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import OptionError
from storage_backends.nixl import library
from storage_backends.nixl.files import Files
from storage_backends.nixl.options import NixlOptions
from storage_backends.nixl.room import Room, Taken

MIB = 1 << 20


def refused(**options: Any) -> OptionError:
    with pytest.raises(OptionError) as caught:
        NixlOptions.model_validate(options).checked()
    return caught.value


def test_what_cannot_work_is_refused_with_the_key_and_the_fix(tmp_path: Path) -> None:
    files = {"path": tmp_path / "pages", "capacity": "1GiB"}
    NixlOptions.model_validate(files).checked()
    NixlOptions.model_validate({**files, "params": {"use_uring": "true"}}).checked()
    NixlOptions.model_validate({"plugin": "OBJ", "bucket": "pages"}).checked()
    assert refused(**files, plugin="UCX").key == "plugin"
    assert "between two running agents" in refused(**files, plugin="UCX").problem
    assert refused(**files, plugin="POSIXX").key == "plugin"
    assert "still move" in refused(**files, params={"use_posix_aio": "true"}).problem
    assert refused(capacity="1GiB").key == "path"
    assert refused(path=tmp_path).key == "capacity"
    assert refused(**files, bucket="pages").key == "bucket"
    assert refused(plugin="OBJ").key == "bucket"
    assert refused(plugin="OBJ", bucket="pages", path=tmp_path).key == "path"
    assert refused(plugin="OBJ", bucket="pages", endpoint="http://host:9000").key == "endpoint"
    secret = refused(plugin="OBJ", bucket="pages", params={"secret_key": "hunter2"})
    assert secret.fix == "use secret_key_env"
    assert "hunter2" not in str(secret)
    (tmp_path / "file").touch()
    assert refused(path=tmp_path / "file", capacity="1GiB").key == "path"


def test_secrets_reach_the_plugin_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "an-id")
    monkeypatch.setenv("MY_SECRET", "hunter2")
    options = NixlOptions(
        plugin="OBJ", bucket="pages", endpoint="https://host:9000", access_key_env="MY_KEY", secret_key_env="MY_SECRET"
    )
    params = options.plugin_params()
    assert (params["access_key"], params["secret_key"]) == ("an-id", "hunter2")
    assert (params["endpoint_override"], params["scheme"]) == ("https://host:9000", "https")
    assert "hunter2" not in repr(options) + str(options) + options.model_dump_json()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which builds are installed, and which CUDA is used."""

    def set_up(cuda: int | None = None, **versions: str) -> None:
        monkeypatch.setattr(library, "_version", lambda package: versions.get(package.replace("-", "_"), ""))
        monkeypatch.setattr(library, "cuda_major", lambda: cuda)
        for name in ("nixl_cu12", "nixl_cu13"):
            monkeypatch.delitem(sys.modules, f"{name}._bindings", raising=False)

    return set_up


def test_the_build_is_the_one_that_is_loaded_or_matches_or_is_there(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(nixl_cu12="1.5.1", nixl_cu13="1.6.0")
    assert library.build(False) == "nixl_cu12"
    machine(cuda=13, nixl_cu12="1.5.1", nixl_cu13="1.6.0")
    assert library.build(True) == "nixl_cu13"
    machine(cuda=13, nixl_cu12="1.5.1")
    assert library.build(False) == "nixl_cu12", "host memory has no CUDA in it"
    with pytest.raises(OptionError, match="CUDA 13 is used here and nixl-cu12 is what is installed") as wrong:
        library.build(True)
    assert "nixl-cu13" in wrong.value.fix
    machine(cuda=13, nixl_cu12="1.5.1", nixl_cu13="1.6.0")
    monkeypatch.setitem(sys.modules, "nixl_cu12._bindings", types.ModuleType("loaded"))
    assert library.build(False) == "nixl_cu12", "two cannot be loaded"
    with pytest.raises(OptionError, match="loaded by another part of this process"):
        library.build(True)


def test_no_nixl_and_an_old_one_are_refused_with_the_reason(machine: Callable[..., None]) -> None:
    machine()
    with pytest.raises(OptionError, match=r"not installed.*pip install 'hicache-ext\[nixl\]'"):
        library.build(False)
    for old in ("0.9.0", "1.4.1", "1.5.0"):
        machine(nixl_cu12=old)
        with pytest.raises(OptionError, match=rf"{old} reports success where a read came short.*>=1\.5\.1"):
            library.build(False)
    machine(nixl_cu12="1.10.0")
    assert library.build(False) == "nixl_cu12"


def test_without_a_device_gpu_plugins_are_refused_and_a_driver_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library._driver_problem.cache_clear()
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(OptionError, match="needs a GPU: there is no NVIDIA driver"):
            library.require_gpu("GDS")
        assert "libcuda" in library._driver_problem()
        library._driver_problem.cache_clear()
    monkeypatch.setattr(library, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(library, "_PROBE_SECONDS", 0.2)
    assert "did not answer" in library._driver_problem()
    library._driver_problem.cache_clear()


# ---- room


Rooms = Callable[..., Room]


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    opened: list[Room] = []

    def open_room(capacity: int, gone: Callable[[str], None] = lambda path: None) -> Room:
        room = Room(tmp_path, capacity, tmp_path / "tmp", gone)
        opened.append(room)
        return room

    yield open_room
    for room in opened:
        room.close()


def put(room: Room, folder: Path, name: str, age: float, size: int = MIB) -> bool:
    """A file of this age (seconds); whether there was room."""
    if not room.take(size):
        return False
    path = folder / name
    path.write_bytes(bytes(size))
    room.made(size)
    now = path.stat().st_mtime
    os.utime(path, (now, now - age))
    return True


def looked(room: Room) -> None:
    """Wait until it has looked at all that is there now."""
    for _ in range(2):  # one may have been on its way
        with room._lock:
            goal = room._looks + 1
            room.look()
            assert room._looked.wait_for(lambda goal=goal: room._looks >= goal, 10)


def test_what_was_used_longest_ago_makes_room(rooms: Rooms, tmp_path: Path) -> None:
    gone: list[str] = []
    room = rooms(8 * MIB, gone.append)
    for i in range(8):
        assert put(room, tmp_path, f"{i}", age=100 - i)
        looked(room)  # one that passed meanwhile may have counted it twice
    os.utime(tmp_path / "0")  # used again
    for i in range(8, 11):
        looked(room)
        assert put(room, tmp_path, f"{i}", age=0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"0", "4", "5", "6", "7", "8", "9", "10"}
    assert sorted(gone) == [str(tmp_path / name) for name in "123"]


def test_files_on_their_way_count_and_stay(rooms: Rooms, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    room = rooms(4 * MIB)
    for i in range(3):
        assert put(room, tmp_path / "tmp", f"{i}", age=1000)
    assert put(room, tmp_path, "page", age=0)
    assert put(room, tmp_path, "next", age=0)
    assert len(list((tmp_path / "tmp").iterdir())) == 3
    assert not (tmp_path / "page").exists()
    assert not room.take(2 * MIB), "nothing else may go"
    assert not room.take(5 * MIB), "larger than all of it"


def test_two_processes_stay_near_the_capacity_of_their_directory(rooms: Rooms, tmp_path: Path) -> None:
    first, second = rooms(40 * MIB), rooms(40 * MIB)
    for i in range(100):
        put(first, tmp_path, f"a{i}", age=1000 - i)
        put(second, tmp_path, f"b{i}", age=1000 - i)
        used = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert used <= 2 * 40 * MIB, "never as if the other were not there, for long"
    for room in (first, second):
        looked(room)
        assert room.take(MIB)
        room.made(MIB)
        room.give(MIB)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40 * MIB


def test_files_that_go_by_other_hands_are_no_trouble(rooms: Rooms, tmp_path: Path) -> None:
    room = rooms(4 * MIB)
    for i in range(4):
        assert put(room, tmp_path, f"{i}", age=100 - i)
    for path in list(tmp_path.iterdir()):
        path.unlink()
    for i in range(4, 12):
        assert put(room, tmp_path, f"{i}", age=0)
    assert room.remove(str(tmp_path / "11"))
    assert not room.remove(str(tmp_path / "11"))


def test_the_file_of_a_page_that_goes_is_the_next_one_s(rooms: Rooms, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    gone: list[str] = []
    room = rooms(8 * MIB, gone.append)
    for i in range(8):
        assert put(room, tmp_path, f"{i}", age=100 - i)
        looked(room)
    was = (tmp_path / "0").stat().st_ino
    assert room.take(MIB, str(tmp_path / "tmp" / "new")) is Taken.FILE
    room.made(MIB)
    assert (tmp_path / "tmp" / "new").stat().st_ino == was
    assert gone == [str(tmp_path / "0")]
    looked(room)
    assert room.take(2 * MIB, str(tmp_path / "tmp" / "larger")) is Taken.ROOM, "those that go are of another size"
    room.made(2 * MIB)
    room.give(2 * MIB)
    assert not (tmp_path / "tmp" / "larger").exists()
    assert sorted(gone) == [str(tmp_path / name) for name in "012"]


def test_what_went_too_early_is_kept_for_the_next_page(rooms: Rooms, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    room = rooms(8 * MIB)
    for i in range(8):
        assert put(room, tmp_path, f"{i}", age=100 - i)
        looked(room)
    wanted, room._wanted = room._wanted, threading.Event()  # no look of its own meanwhile
    room._used += 2 * MIB  # as if what came during a look had been counted twice
    before = room.used
    assert room.take(MIB, str(tmp_path / "tmp" / "a")) is Taken.FILE
    room.made(MIB)
    spares = list((tmp_path / "tmp").glob("*.spare"))
    assert len(spares) == 2
    assert room.used == before, "three went, one came, two are there still"
    for name in "bc":
        assert room.take(MIB, str(tmp_path / "tmp" / name)) is Taken.FILE
        room.made(MIB)
    assert not any(spare.exists() for spare in spares)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4", "5", "6", "7", "tmp"}
    room._used -= MIB  # they were not: one of the two is right
    assert room.take(MIB, str(tmp_path / "tmp" / "d")) is Taken.FILE
    (spare,) = (tmp_path / "tmp").glob("*.spare")
    room._wanted = wanted
    room.close()
    assert not spare.exists()


def test_a_reader_can_tell_that_his_file_became_another_page_s(rooms: Rooms, tmp_path: Path) -> None:
    """Its times say so, or its name does."""
    root = tmp_path / "pages"
    root.mkdir()
    room = Room(root, 64 * MIB, root / "x" / "tmp", lambda path: None)
    files = Files(root, "x", room)
    for name in ("x/1/s/aa", "x/1/s/ab", "x/1/s/ac"):
        made = files.create(name, MIB)
        assert made.publish(False)
        made.close()
    assert not files.create("x/1/s/ab", MIB).publish(False), "there already"
    page, same, other = (files.open(f"x/1/s/{key}", MIB) for key in ("aa", "ab", "ac"))
    assert not any(one.changed() for one in (page, same, other))
    os.rename(root / "x/1/s/aa/aa.page", root / "x" / "tmp" / "reused")
    assert page.changed()
    os.utime(root / "x/1/s/ab/ab.page", (1, 1))
    assert same.changed()
    assert not other.changed()
    os.replace(root / "x" / "tmp" / "reused", root / "x/1/s/ac/ac.page")
    assert other.changed()
    for one in (page, same, other):
        one.close()
    files.close()
