"""`doctor`: each judgement from made-up facts, and the whole command here, unprivileged, without io_uring, with a
hung disk."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hicache_ext.cli.main import app
from hicache_ext.doctor import Finding, Level, checkup, disk, engines, memory, shared_memory, software, tier
from hicache_ext.doctor.isolation import Call, ask
from storage_backends.base import Dispatcher
from storage_backends.direct_io import DirectIo
from storage_backends.local import LocalBackend, engine_liburing, engine_threads, writer
from storage_backends.local.engine import PREFERENCE
from storage_backends.memory.region import Pages, Room
from tests.pages import HostPool, chain, namespace
from tests.redis_server import RedisServer

#: Imported while whoever runs the tests may: the interpreter itself may lie where nobody cannot read.
_ENGINES = (engine_liburing, engine_threads)

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
PLACE = tier.Place("local", Path("/nowhere"), 100 * GIB)
LOADS = EntryPoint("hicache_ext", "hicache_ext.sglang.plugin:register", software.PLUGIN_GROUP)


def config_file(folder: Path, **values: Any) -> Path:
    tiers = [{"type": "local", "path": str(folder / "tier"), "capacity": "64MiB", **values}]
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"tiers": tiers}))
    return file


def doctor(*arguments: object, prefix: tuple[str, ...] = (), **options: Any) -> tuple[int, dict[str, Any]]:
    """The command in a process of its own: exit code and JSON."""
    line = [*prefix, sys.executable, "-m", "hicache_ext.cli.main", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, **{"cwd": ROOT, **options})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def by_name(told: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in told["findings"]}


# --- judgements


@pytest.mark.parametrize(
    ("failing", "wanted", "levels"),
    [
        ("", [], "ok ok ok"),
        ("native", ["auto"], "warning ok ok"),
        ("native liburing", [], "warning warning ok"),
        ("liburing", [], "ok ok ok"),  # a faster one works
        ("native liburing threads", [], "error error error"),
        ("liburing", ["liburing"], "ok error ok"),
        ("native", ["threads"], "warning ok ok"),
    ],
)
def test_engines(failing: str, wanted: list[str], levels: str) -> None:
    tried = {
        name: engines.Trial("not built", "build it") if name in failing.split() else engines.Trial()
        for name in PREFERENCE
    }
    findings = engines.judge(tried, wanted)
    assert [str(finding.level) for finding in findings] == levels.split()
    for finding, name in zip(findings, PREFERENCE, strict=True):
        assert finding.name == f"I/O engine {name}"
        assert ("not built" in finding.text) == (name in failing.split())
        assert bool(finding.fix) == (finding.level is not Level.OK)


def test_a_forbidden_io_uring_is_blamed_on_who_forbids_it() -> None:
    assert "sysctl" in engines.io_uring_fix("x", "2\n", "2")
    assert "io_uring_group" in engines.io_uring_fix("x", "1", "0")
    assert "--security-opt seccomp" in engines.io_uring_fix("x", "0", "2")
    assert engines.io_uring_fix("x", "", "0") == "x"


@pytest.mark.parametrize(
    ("version", "level"),
    [("", "ok"), ("0.5.16", "error"), ("0.5.17", "ok"), ("0.5.23.post1", "ok"), ("0.5.24", "error"), ("odd", "error")],
)
def test_sglang_versions(version: str, level: str) -> None:
    finding = software.sglang(version)
    assert finding.level == level
    assert "0.5.17 to 0.5.23" in finding.text


@pytest.mark.parametrize(
    ("version", "level"),
    [("", "ok"), ("0.24.2", "error"), ("0.25.0", "ok"), ("0.32.0+cpu", "ok"), ("0.33.0", "error"), ("odd", "error")],
)
def test_vllm_versions(version: str, level: str) -> None:
    finding = software.vllm(version)
    assert finding.level == level
    assert "0.25 to 0.32" in finding.text or not version


def test_an_environment_without_an_engine_is_a_warning() -> None:
    assert software.engines_installed("", "")[0].level is Level.WARNING
    assert software.engines_installed("0.5.23", "") == []


@pytest.mark.parametrize(
    ("release", "level"), [("5.4.0-generic", "warning"), ("5.15.0", "ok"), ("6.18.44-x", "ok"), ("strange", "warning")]
)
def test_kernels(release: str, level: str) -> None:
    assert software.kernel(release, container=False).level == level
    assert "container" in software.kernel(release, container=True).text


@pytest.mark.parametrize(
    ("entries", "allowed", "version", "level", "part"),
    [
        ([LOADS], "", "0.5.23", "ok", "visible"),
        ([LOADS], "other, hicache_ext", "0.5.23", "ok", "visible"),
        ([LOADS], "other", "0.5.23", "error", "SGLANG_PLUGINS=other"),
        ([], "", "0.5.23", "error", "no entry point"),
        ([], "", "", "warning", "no entry point"),
        ([EntryPoint("hicache_ext", "nowhere:register", "g")], "", "0.5.23", "error", "does not load"),
    ],
)
def test_plugin(entries: list[EntryPoint], allowed: str, version: str, level: str, part: str) -> None:
    finding = software.plugin(entries, allowed, version)
    assert finding.level == level
    assert part in finding.text


def test_checksums_in_software_are_a_warning() -> None:
    assert software.checksums("native (sse4.2)").level is Level.OK
    assert software.checksums("crc32c wheel (software)").level is Level.WARNING


@pytest.mark.parametrize(
    ("limit", "exempt", "level"),
    [
        (8 << 20, False, "warning"),
        (8 << 20, True, "ok"),
        (resource.RLIM_INFINITY, False, "ok"),
        (2 * GIB, False, "ok"),
    ],
)
def test_memlock(limit: int, exempt: bool, level: str) -> None:
    assert memory.memlock(limit, exempt).level == level


@pytest.mark.parametrize(
    ("mode", "got", "level", "fix"),
    [
        ("always [madvise] never\n", "2 MiB (transparent)", "ok", ""),
        ("[always] madvise never\n", "4 KiB", "warning", "compact_memory"),
        ("always madvise [never]\n", "4 KiB", "warning", "echo madvise"),
        ("", "4 KiB", "warning", "echo madvise"),
    ],
)
def test_huge_pages(mode: str, got: str, level: str, fix: str) -> None:
    meminfo = "MemTotal: 5 kB\nHugePages_Total:      64\nHugePages_Free:       60\nHugepagesize:       2048 kB\n"
    hugetlb, transparent = memory.huge_pages(meminfo, mode, got)
    assert "60 of 64 free, 2 MiB" in hugetlb.text
    assert transparent.level == level
    assert fix in transparent.fix
    assert "none reserved" in memory.huge_pages("", mode, got)[0].text


MOUNTS = """\
22 27 0:21 / / rw - ext4 /dev/vda rw
23 22 259:1 / /nvme rw,noatime shared:1 - xfs /dev/nvme0n1p1 rw
24 22 0:30 / /with\\040space rw - tmpfs tmpfs rw
25 22 0:31 / /nvme/over rw - overlay overlay rw,lowerdir=/x
broken line
"""


def test_mounts() -> None:
    found = {
        path: disk.mount_of(path, MOUNTS).kind for path in ("/", "/nvme/a", "/nvmex", "/with space/a", "/nvme/over")
    }
    assert found == {"/": "ext4", "/nvme/a": "xfs", "/nvmex": "ext4", "/with space/a": "tmpfs", "/nvme/over": "overlay"}
    assert disk.mount_of("/a", "").kind == "unknown"


@pytest.mark.parametrize(
    ("kind", "name", "rotates", "level", "part"),
    [
        ("xfs", "nvme0n1", False, "ok", "NVMe"),
        ("ext4", "sda", False, "ok", "SATA"),
        ("ext4", "sda", True, "warning", "rotating"),
        ("ext4", "vda", True, "ok", "virtio"),  # virtio says that of any disk below
        ("tmpfs", "", False, "warning", "memory"),
        ("ext4", "zram0", False, "warning", "memory"),
        ("nfs4", "", False, "warning", "not a disk of this machine"),
        ("fuse.sshfs", "", False, "warning", "not a disk of this machine"),
        ("overlay", "", False, "warning", "container"),
        ("btrfs", "nvme0n1", False, "warning", "copies on write"),
    ],
)
def test_disk_kinds(kind: str, name: str, rotates: bool, level: str, part: str) -> None:
    finding = disk.judge("disk", disk.Mount("/", kind, "source"), name, rotates)
    assert finding.level == level
    assert part in finding.text


def test_block_devices_from_sys(tmp_path: Path) -> None:
    device = tmp_path / "devices" / "nvme0n1"
    (device / "queue").mkdir(parents=True)
    (device / "queue" / "rotational").write_text("0\n")
    (device / "nvme0n1p1").mkdir()
    (device / "nvme0n1p1" / "partition").write_text("1\n")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / "259:1").symlink_to(device / "nvme0n1p1")
    assert disk.block_device(os.makedev(259, 1), tmp_path) == ("nvme0n1", False)
    assert disk.block_device(os.makedev(0, 30), tmp_path) == ("", False)


@pytest.mark.parametrize(
    ("free", "used", "level"),
    [(1000, 0, "ok"), (110, 0, "warning"), (99, 0, "error"), (50, 60, "warning"), (90, 99, "ok")],
)
def test_space(free: int, used: int, level: str) -> None:
    """A tier of 100 GiB on a disk of 1000."""
    assert tier.space(PLACE, free * GIB, 1000 * GIB, used * GIB).level == level


@pytest.mark.parametrize(
    ("there", "soft", "hard", "level"),
    [
        (0, 1024, 4096, "warning"),
        (0, 1024, 1024, "error"),
        (0, 65536, 65536, "ok"),
        (70000, 65536, 1 << 20, "warning"),
        (0, resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok"),
    ],
)
def test_descriptors(there: int, soft: int, hard: int, level: str) -> None:
    assert tier.descriptors(PLACE, there, soft, hard).level == level


def test_extents_are_counted_as_the_tier_cuts_them() -> None:
    assert (tier._EXTENT_BYTES, tier._EXTENTS_PER_SHARE) == (writer._MAX_EXTENT, writer._EXTENTS_PER_SHARE)


def test_direct_io() -> None:
    assert "512 bytes" in tier.direct_io("local", DirectIo(True, 512, 512)).text
    finding = tier.direct_io("local", DirectIo(False, 1, 1, "open with O_DIRECT: Invalid argument"))
    assert finding.level is Level.WARNING
    assert "Invalid argument" in finding.text


def test_small_pages_are_a_warning(tmp_path: Path) -> None:
    dispatcher = Dispatcher()
    options = LocalBackend.Options.model_validate({"path": tmp_path / "t", "capacity": 64 << 20, "engine": "threads"})
    backend = LocalBackend(options, dispatcher)
    for lengths in ((4096, 4096), (131072, 131072)):
        space, keys = namespace(lengths), chain("a", 3)
        backend.write(HostPool(space, 3).write_batch(keys)).result(30)
    backend.close()
    dispatcher.close()
    findings = tier.contents(tier.Place("local", tmp_path / "t", 64 << 20))
    (overhead,) = [finding for finding in findings if finding.name == "local: overhead"]
    assert overhead.level is Level.WARNING
    assert namespace((4096, 4096)).digest.hex() in overhead.text
    assert "50%" in overhead.text
    assert "6 pages in 2 namespaces" in findings[0].text


def test_another_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("hicache-ext local tier, format 9\n")
    (finding,) = tier.contents(tier.Place("local", tmp_path, 1))
    assert finding.level is Level.ERROR
    assert "format 9" in finding.text
    assert "empty directory" in finding.fix


# --- isolation


def test_calls_run_at_once_and_keep_their_order() -> None:
    start = time.monotonic()
    answers = ask([Call(lambda i=i: (time.sleep(0.5), i)[1]) for i in range(6)])
    assert [answer.value for answer in answers] == list(range(6))
    assert time.monotonic() - start < 2.5


def test_a_call_that_hangs_is_left_behind() -> None:
    start = time.monotonic()
    hung, quick, large = ask([Call(lambda: time.sleep(60), 0.5), Call(lambda: 7), Call(lambda: "x" * 1_000_000)])
    assert time.monotonic() - start < 5
    assert hung.problem == "no answer within 0.5 s"
    assert quick.value == 7
    assert len(large.value) == 1_000_000


def test_a_call_that_dies_or_raises_is_a_problem() -> None:
    died, raised, left, other = ask(
        [
            Call(lambda: os.kill(os.getpid(), signal.SIGSYS)),
            Call(lambda: 1 / 0),
            Call(lambda: os._exit(3)),
            Call(lambda: object()),
        ]
    )
    assert "PydanticSerializationError" in other.problem
    assert died.problem == "ended by SIGSYS"
    assert "ZeroDivisionError" in raised.problem
    assert left.problem == "ended without an answer"


def test_answers_are_data_of_the_type_that_was_said(tmp_path: Path) -> None:
    said = [Finding("memlock", Level.WARNING, 'a "quoted"\n\0 line', "fix"), Finding("kernel", Level.OK, "6.18")]
    place = tier.Place("local", tmp_path, 1 << 40, "auto", ((tmp_path, 3),))
    trial = engines.Trial("no", "fix")
    findings, places, tried, wrong = ask(
        [
            Call(lambda: said, gives=list[Finding]),
            Call(lambda: ([place], {"a": None}), gives=tuple[list[tier.Place], dict[str, None]]),
            Call(lambda: trial, gives=engines.Trial),
            Call(lambda: "text", gives=list[Finding]),
        ]
    )
    assert (findings.value, places.value, tried.value) == (said, ([place], {"a": None}), trial)
    assert wrong.problem == "its answer cannot be read"


def test_a_hung_disk_is_an_error_and_does_not_hang_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicache_ext.doctor.tier.probe", lambda place: time.sleep(60))
    start = time.monotonic()
    findings = checkup(config_file(tmp_path), seconds=3)
    assert time.monotonic() - start < 10
    (hung,) = [finding for finding in findings if finding.level is Level.ERROR]
    assert hung.name == "local: path"
    assert "no answer" in hung.text
    assert any(finding.name == "python" for finding in findings)


def test_a_server_is_asked_whether_it_answers(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    with RedisServer() as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        ports = {"near": server.port, "far": nobody.getsockname()[1]}
        tiers = [{"type": "redis", "name": name, "url": f"redis://127.0.0.1:{port}"} for name, port in ports.items()]
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"tiers": tiers}))
        found = {finding.name: finding for finding in checkup(file)}
    assert found["near: server"].level is Level.OK
    assert re.search(r"answers, a lookup in [\d.]+ ms \(.*server redis \d", found["near: server"].text)
    assert found["far: server"].level is Level.ERROR
    assert "refused" in found["far: server"].text
    assert found["far: server"].fix


# --- the command


def test_the_command_here(tmp_path: Path) -> None:
    code, told = doctor("--config", config_file(tmp_path))
    found = by_name(told)
    assert code == (1 if told["errors"] else 0)
    assert told["ok"] == (not told["errors"])
    assert found["configuration"]["level"] == "ok"
    assert found["I/O engine threads"]["level"] == "ok"
    for name in ("python", "kernel", "sglang", "sglang plugin", "checksums", "memlock", "huge pages, transparent"):
        assert found[name]["text"]
    for name in ("path", "disk", "direct I/O", "space", "file descriptors"):
        assert found[f"local: {name}"]["text"]
    assert not (tmp_path / "tier").exists(), "doctor makes nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert all(finding["fix"] for finding in told["findings"] if finding["level"] != "ok")


def test_text_has_a_fix_below_each_warning(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--config", str(config_file(tmp_path, capacity="900TiB"))])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    for i, line in enumerate(lines):
        if line.startswith(("warning", "error")) and line[:1].isalpha():
            assert "fix:" in lines[i + 1]
    assert sum(line.startswith("error") and "capacity" in line for line in lines) == 1, "said once"
    assert "in order" in lines[-1]


def test_the_native_engine_is_visible_built_or_not() -> None:
    _, told = doctor()
    text = by_name(told)["I/O engine native"]["text"]
    assert "works" in text or "not built" in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tiers: []", "at least 1"),
        ("tiers: [", "not valid yaml"),
        ("tiers: [{type: local, path: /tmp/x, capacity: 1GX}]", "not a size"),
        ("tiers: [{type: local, path: /dev/null, capacity: 1GiB}]", "not a directory"),
        ("tiers: 5", "tiers"),
    ],
)
def test_a_wrong_configuration_is_an_error_and_the_rest_is_checked(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    findings = checkup(file)
    wrong = [finding for finding in findings if finding.name == "configuration"]
    assert wrong
    assert all(finding.level is Level.ERROR and finding.fix for finding in wrong)
    assert any(part in finding.text for finding in wrong)
    assert any(finding.name == "checksums" for finding in findings)


def test_a_wrong_call_ends_with_2(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "none.yaml")]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "--nonsense"]).exit_code == 2


def test_an_engine_that_is_asked_for_and_absent_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicache_ext.doctor.engines.attempt", lambda name: engines.Trial("not built", "build it"))
    findings = {finding.name: finding for finding in checkup(config_file(tmp_path, engine="native"))}
    assert findings["I/O engine native"].level is Level.ERROR


@pytest.mark.parametrize("punishment", ["errno", "kill"])
def test_where_io_uring_is_forbidden(punishment: str) -> None:
    probe = subprocess.run([sys.executable, "-m", "tests.seccomp", punishment, "true"], cwd=ROOT, capture_output=True)
    if probe.returncode:
        pytest.skip("no seccomp filters here")
    _, told = doctor(prefix=(sys.executable, "-m", "tests.seccomp", punishment))
    found = by_name(told)
    for name in ("native", "liburing"):
        engine = found[f"I/O engine {name}"]
        assert engine["level"] == "warning"
        if "not built" not in engine["text"] and "installed" not in engine["text"]:
            assert "forbidden" in engine["text"]
            assert "seccomp" in engine["fix"]
    assert found["I/O engine threads"]["level"] == "ok"
    assert "is what `engine: auto` takes" in found["I/O engine threads"]["text"]


def as_nobody(config: Path) -> tuple[dict[str, Finding], list[Finding]]:
    """The check-up by name, and its errors, as the user nobody without any capability."""

    def become_and_check() -> list[Finding]:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return checkup(config)

    (answer,) = ask([Call(become_and_check, 60, list[Finding])])
    assert not answer.problem
    findings: list[Finding] = answer.value
    return {finding.name: finding for finding in findings}, [f for f in findings if f.level is Level.ERROR]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_as_nobody_without_privileges() -> None:
    """A user without home, rights or capabilities: everything is told, and a path that is not theirs is an error."""
    place = Path(tempfile.mkdtemp())
    software.probe(), memory.probe()  # import what they need, as _ENGINES does
    try:
        place.chmod(0o755)
        found, errors = as_nobody(config_file(place))
        assert found["local: path"].level is Level.ERROR
        assert "not writable" in found["local: path"].text
        assert "install -d" in found["local: path"].fix
        assert "CAP_IPC_LOCK" not in found["memlock"].text
        assert found["I/O engine threads"].level is Level.OK
        assert found["I/O engine liburing"].level is Level.OK or found["I/O engine liburing"].fix
        (place / "tier").mkdir()
        os.chown(place / "tier", 65534, 65534)
        found, errors = as_nobody(config_file(place))
        assert found["local: path"].level is Level.OK
        assert found["local: direct I/O"]
        assert not errors, errors
    finally:
        shutil.rmtree(place)


def test_no_finding_without_a_fix() -> None:
    findings: list[Finding] = checkup()
    assert all(finding.fix for finding in findings if finding.level is not Level.OK)


@pytest.mark.parametrize(
    ("processes", "reserved", "room", "pages", "levels", "word"),
    [
        (2, 0, 0, Pages.SMALL, ["ok"], "2 processes"),
        (0, 11 * GIB, 0, Pages.SMALL, ["ok"], "reserved"),
        (0, 0, 20 * GIB, Pages.TRANSPARENT, ["ok", "ok"], "left"),
        (0, 0, 20 * GIB, Pages.SMALL, ["ok", "warning"], "left"),
        (0, GIB, 9 * GIB, Pages.TRANSPARENT, ["error", "ok"], "a group has 9.0GiB left"),
    ],
)
def test_a_memory_tier(processes: int, reserved: int, room: int, pages: Pages, levels: list[str], word: str) -> None:
    place = shared_memory.Place("ram", 10 * GIB, "hicache", Path("/nowhere"))
    findings = shared_memory.judge(place, processes, reserved, Room(room, "a group"), pages)
    assert [finding.level.value for finding in findings] == levels
    assert word in findings[0].text
    assert all(finding.fix for finding in findings if finding.level is not Level.OK)


def test_a_memory_tier_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({"tiers": [{"type": "memory", "name": "ram", "capacity": "3TiB", "region": "none"}]})
    )
    findings = {finding.name: finding for finding in checkup(file)}
    assert findings["configuration"].level is Level.OK
    assert findings["ram: memory"].level is Level.ERROR
    assert "lower `capacity` to less than" in findings["ram: memory"].fix
