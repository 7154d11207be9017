"""The gds tier over a driver and a cuFile that stand in (no GPU): what is decided and said, and a page's whole way.

What a machine without a GPU can show: that the tier, csrc/gds and cuFile's calls fit together; which way is taken when
something is missing; that nothing but the page that was asked for is ever served, where device memory and checksums are
the stand-ins'. The real header, the real libraries and our kernels: tests/gpu/test_gds.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storage_backends.gds import volume
from storage_backends.gds.decision import NO_STREAM

pytest.importorskip("torch")
pytest.importorskip("hicache_ext._cuda", reason="not built")

from tests import past_blocks

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc")
_EVERYWHERE = [
    "both_routes_read_what_either_wrote",
    "bytes_around_a_page_are_left_alone",
    "registered_memory_is_told_to_cufile",
    "a_flipped_byte_is_never_served",
    "a_slot_that_is_rewritten_in_mid_read_is_a_miss",
    "without_the_second_look_at_the_header_it_would_be_served",
    "cufile_that_fails_goes_out_of_use",
    "a_disk_that_fails_is_the_disk_s_trouble",
    "a_stream_in_error",
    "out_of_device_memory",
    "a_forked_process",
    "a_closed_tier_and_a_cancelled_batch",
    "a_file_that_goes_is_let_go_of",
    "linker_pages_go_past_the_host",
    "linker_a_bad_page_fails_its_load_alone",
    "linker_with_a_tier_below_pages_are_written_through_the_host",
    *(f"vllm_{name}" for name in past_blocks.CASES),
]
#: Libraries that are there, what goes wrong with the driver and with cuFile -> cases.
MACHINES: dict[tuple[str, str, str], list[str]] = {
    ("cuda cufile", "kernels", ""): [
        *_EVERYWHERE,
        "the_way_that_is_taken",
        "the_way_that_is_asked_for",
        "stream_order_is_for_true_gds_alone",
    ],
    ("cuda cufile", "kernels", "nobatch"): [_EVERYWHERE[0]],
    ("cuda cufile", "kernels", "noregister"): ["registered_memory_is_told_to_cufile"],
    ("cuda cufile", "kernels", "direct"): [
        _EVERYWHERE[0],
        "registered_memory_is_told_to_cufile",
        "modes_that_are_asked_for",
        "the_way_that_is_taken",
    ],
    ("cuda cufile", "kernels", "direct nobatch"): [  # in stream order
        _EVERYWHERE[0],
        "a_slot_that_is_rewritten_in_mid_read_is_a_miss",
        "a_stream_in_error",
        "the_way_that_is_taken",
    ],
    ("cuda cufile", "kernels", "peer nobatch"): ["stream_order_is_for_true_gds_alone"],
    ("cuda cufile", "kernels", "direct nobatch nostream"): ["the_way_that_is_taken"],
    ("cuda cufile", "kernels", "direct nobatch alone"): ["the_way_that_is_taken"],
    ("cuda cufile", "kernels", "direct nobatch inner"): ["the_way_that_is_taken"],
    ("cuda cufile", "kernels", "noplace"): ["cufile_does_not_take_the_file"],
    ("cuda cufile", "kernels", "peer"): ["peer_to_peer_that_does_not_reach_this_disk"],
    ("cuda cufile", "kernels", "hangs"): ["cufile_hangs"],
    ("cuda cufile", "kernels", "refuses"): ["cufile_refuses"],
    ("cuda cufile", "", ""): ["no_kernels"],
    ("cuda cufile", "none", ""): ["no_device"],
    ("cuda", "kernels", ""): ["no_cufile"],
    ("", "", ""): ["no_driver"],
}
RUNS = [(machine, name) for machine, names in MACHINES.items() for name in names]


def _real_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each set of libraries that a machine may have."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    if _real_driver():
        pytest.skip("this machine has a CUDA driver: tests/gpu/test_gds.py")
    folder = tmp_path_factory.mktemp("libraries")
    names = {"cuda": ("libcuda.so.1", "driver"), "cufile": ("libcufile.so.0", "cufile")}
    found = {}
    for those in ("", "cuda", "cuda cufile"):
        place = found[those] = folder / (those.replace(" ", "-") or "none")
        place.mkdir()
        for name in those.split():
            so, source = names[name]
            command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{so}", "-o", place / so]
            subprocess.run([*command, ROOT / "tests" / f"stand_in_{source}.c"], check=True, timeout=60)
    return found


@pytest.fixture(scope="module")
def said(libraries: dict[str, Path]) -> dict[tuple[tuple[str, str, str], str], str]:
    """What each case printed. A machine is a process, in which every case is a fork."""
    found = {}
    for machine, names in MACHINES.items():
        those, cuda, cufile = machine
        environment = {
            **os.environ, "LD_LIBRARY_PATH": str(libraries[those]), "STAND_IN_CUDA": cuda, "STAND_IN_CUFILE": cufile,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.gds_worker", *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        text = done.stdout + done.stderr
        for name in names:
            found[machine, name] = text
    return found


@pytest.mark.parametrize(("machine", "name"), RUNS, ids=[f"{name}-{m[2] or m[1] or 'bare'}" for m, name in RUNS])
def test_over_libraries_that_stand_in(
    machine: tuple[str, str, str], name: str, said: dict[tuple[tuple[str, str, str], str], str]
) -> None:
    text = said[machine, name]
    if "built without nvcc" in text and name != "no_kernels":
        pytest.skip("built without nvcc: nothing is verified on a device")
    assert f"{name}: ok" in text, text


STAGING = "no GPU-direct storage (no nvidia-fs, and no PCIe peer to peer; cuFile's compatibility mode is slower "
TAKEN = {
    "": STAGING,
    "direct": "true GPUDirect Storage, cuFile 1.99 in batches, device 0 stand-in",
    "direct nobatch": "true GPUDirect Storage, cuFile 1.99 in stream order, device 0 stand-in, no batch: ",
    "direct nobatch nostream": "true GPUDirect Storage, cuFile 1.99 call by call, device 0 stand-in, no batch: ",
    "direct nobatch alone": "true GPUDirect Storage, cuFile 1.99 call by call, device 0 stand-in, no batch: ",
    "direct nobatch inner": "true GPUDirect Storage, cuFile 1.99 call by call, device 0 stand-in, no batch: ",
}


@pytest.mark.parametrize("machine", TAKEN)
def test_the_way_that_is_taken_is_said(machine: str, said: dict[tuple[tuple[str, str, str], str], str]) -> None:
    text = said[("cuda cufile", "kernels", machine), "the_way_that_is_taken"]
    if "built without nvcc" in text:
        pytest.skip("built without nvcc: nothing is verified on a device")
    assert f"decision: {TAKEN[machine]}" in text


def test_compatibility_mode_is_taken_when_asked_for(said: dict[tuple[tuple[str, str, str], str], str]) -> None:
    text = said[("cuda cufile", "kernels", ""), "the_way_that_is_asked_for"]
    if "built without nvcc" in text:
        pytest.skip("built without nvcc: nothing is verified on a device")
    wanted = "cuFile in compatibility mode (mode: compatibility), cuFile 1.99 call by call, device 0 stand-in"
    assert f"decision: {wanted}" in text


def test_what_cufile_looks_up_before_it_takes_a_file(tmp_path: Path) -> None:
    number = os.stat(tmp_path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    udev, system = tmp_path / "udev", tmp_path / "sys"
    assert "not on a block device" in str(volume.problem(tmp_path, udev, system))
    (system / "dev" / "block" / name).mkdir(parents=True)
    assert "mount the host's /run/udev" in str(volume.problem(tmp_path, udev, system))
    udev.mkdir()
    assert f"udev does not know the file system on block device {name}" in str(volume.problem(tmp_path, udev, system))
    (udev / f"b{name}").write_text("I:1\nE:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n")
    assert volume.problem(tmp_path, udev, system) is None


def _over(libraries: dict[str, Path], cufile: str) -> dict[str, str]:
    place = str(libraries["cuda cufile"])
    return {**os.environ, "LD_LIBRARY_PATH": place, "STAND_IN_CUDA": "kernels", "STAND_IN_CUFILE": cufile}


def test_a_process_that_ends_with_reads_under_way(libraries: dict[str, Path], tmp_path: Path) -> None:
    """Its lanes come back from cuFile before the interpreter is taken down."""
    script = f"""
from pathlib import Path
from tests.gds_cases import filled
from tests.stand_ins import OnDevice
backend, space, keys, pool = filled(Path({str(tmp_path)!r}) / "tier", OnDevice, 128, (8192,))
backend.read(pool.batch(keys))
print("ends")
"""
    environment = _over(libraries, "slow")
    for _ in range(3):  # otherwise it is one in three that does not end well
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment
        )
        if "built without nvcc" in done.stderr:
            pytest.skip("built without nvcc: nothing is verified on a device")
        assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def _bench(libraries: dict[str, Path], cufile: str, tmp_path: Path) -> tuple[int, str, dict[str, Any]]:
    """By calls and in stream order: exit code, what it said, what it wrote."""
    file = tmp_path / "gds.json"
    command = ["bench", "gds", "--path", tmp_path, "--size", "8MiB", "--page", "64KiB", "--rounds", "1", "--json", file]
    command += ["--way", "calls", "--way", "stream"]
    done = subprocess.run(
        [sys.executable, "-m", "hicache_ext.cli.main", *command], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=_over(libraries, cufile),
    )  # fmt: skip
    if "built without nvcc" in done.stderr:
        pytest.skip("built without nvcc: nothing is verified on a device")
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text())


def test_bench_goes_on_without_a_way_that_is_not_to_be_had(libraries: dict[str, Path], tmp_path: Path) -> None:
    code, text, result = _bench(libraries, "", tmp_path)
    assert code == 0, text
    assert {row["subject"] for row in result["rows"]} == {"staging", "o_direct", "ours-calls", "cufile-calls"}
    assert all(row["gb_per_s"] for row in result["rows"])
    assert result["gds"]["stream"] == NO_STREAM
    assert f"stream: {NO_STREAM}" in text


def test_bench_goes_on_without_what_fails(libraries: dict[str, Path], tmp_path: Path) -> None:
    code, text, result = _bench(libraries, "direct tires", tmp_path)
    assert code == 1, text
    rows = {(row["subject"], row["op"]): row for row in result["rows"]}
    failed = {subject for subject, op in rows if rows[subject, op]["gb_per_s"] is None}
    assert failed == {"ours-stream", "cufile-stream"}
    assert {subject for subject, _ in rows} - failed == {"staging", "o_direct", "ours-calls", "cufile-calls"}
    assert "ours-stream: not every page arrived" in rows["ours-stream", "read"]["failed"]
    assert "bench gds: ours-stream, pages of 64 KiB: ours-stream: not every page arrived" in text
