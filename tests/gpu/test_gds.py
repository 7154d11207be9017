"""The gds tier on a GPU: both routes, verification on the device, and the faults that a device can be made to have.

Where there is no nvidia-fs this is cuFile in compatibility mode, which `-rA` shows. The same cases over libraries that
stand in: tests/unit/test_gds.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from storage_backends.base import Outcome
from storage_backends.gds.decision import Mode, Way, decide, libraries
from tests import gds_cases
from tests.gds_cases import filled, opened, read
from tests.pages import HostPool, chain, namespace

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
from tests.gpu.pool import GpuPool  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _cufile(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.zeros(1, device="cuda")
    decision = decide("compatibility", "auto", None, [tmp_path_factory.mktemp("probe")])
    print(f"\n{decision}\n{libraries()}")
    assert decision.mode is not Mode.STAGING, decision.why


@pytest.mark.parametrize("way", list(Way))
def test_both_routes_read_what_either_wrote(way: str, tmp_path: Path) -> None:
    decision = decide(gds_cases.cufile_mode(), way, None, [tmp_path])
    print(decision)
    if decision.mode is Mode.STAGING:
        pytest.skip(f"no {way} here: {decision.why}")
    backend = gds_cases.both_routes_read_what_either_wrote(tmp_path / "tier", GpuPool, way=way)
    assert backend.decision.way == way


def test_bytes_around_a_page_are_left_alone(tmp_path: Path) -> None:
    gds_cases.bytes_around_a_page_are_left_alone(tmp_path / "tier", GpuPool)


def test_a_flipped_byte_is_never_served(tmp_path: Path) -> None:
    gds_cases.a_flipped_byte_is_never_served(tmp_path / "tier", GpuPool)


def test_a_slot_that_is_rewritten_in_mid_read_is_a_miss(tmp_path: Path) -> None:
    gds_cases.a_slot_that_is_rewritten_in_mid_read_is_a_miss(tmp_path / "tiers", GpuPool)


def test_without_the_second_look_it_would_be_served(tmp_path: Path) -> None:
    gds_cases.without_the_second_look_at_the_header_it_would_be_served(tmp_path / "tier", GpuPool)


def test_memory_that_begins_anywhere(tmp_path: Path) -> None:
    """Addresses that no storage could take as they are."""
    space, keys = namespace((70_272, 5_000)), chain("skewed", 5)
    backend, pool = opened(tmp_path / "tier"), GpuPool(space, 5, skew=208)
    assert backend.write(pool.write_batch(keys)).result(60) == [Outcome.HIT] * 5
    assert read(backend, pool, keys) == read(backend, HostPool(space, 5), keys) == [Outcome.HIT] * 5
    backend.close()


def test_registered_memory(tmp_path: Path) -> None:
    backend, space, keys, _ = filled(tmp_path / "tier", GpuPool, 16, (1 << 20, 1 << 20))
    pool = GpuPool(space, 16)
    backend.register_memory(pool.device.data_ptr(), pool.device.numel())
    print("unregistered:", backend.stats()["gds_unregistered"] or "no")
    assert read(backend, pool, keys) == [Outcome.HIT] * 16
    assert backend.write(pool.write_batch(chain("two", 16))).result(60) == [Outcome.HIT] * 16
    assert read(backend, pool, chain("two", 16)) == [Outcome.HIT] * 16
    backend.close()


@pytest.mark.parametrize("way", list(Way))
def test_many_batches_at_a_time(way: str, tmp_path: Path) -> None:
    """Reads and writes of both kinds of memory, all under way at once: more pieces than cuFile has buffers for."""
    space = namespace((256 << 10,))
    backend = opened(tmp_path / "tier", capacity=512 << 20, way=way)
    if backend.decision.mode is Mode.STAGING:
        pytest.skip(f"no {way} here: {backend.decision.why}")
    pools = [(GpuPool if i % 2 else HostPool)(space, 24) for i in range(8)]
    for _ in range(3):
        chains = [chain(f"chain {i}", 24) for i in range(8)]
        writes = [backend.write(pool.write_batch(keys)) for pool, keys in zip(pools, chains, strict=True)]
        assert all(done.result(60) == [Outcome.HIT] * 24 for done in writes)
        for pool in pools:
            pool.poison()
        reads = [backend.read(pool.batch(chains[7 - i])) for i, pool in enumerate(pools)]
        assert all(done.result(60) == [Outcome.HIT] * 24 for done in reads)
        for i, pool in enumerate(pools):
            assert all(pool.right(page, key) for page, key in enumerate(chains[7 - i]))
    backend.close()


def test_out_of_device_memory(tmp_path: Path) -> None:
    """Whatever fails for want of it, no page is wrong, none is called damaged, and nothing hangs."""
    backend, space, keys, pool = filled(tmp_path / "tier", GpuPool, 32, (1 << 20,))
    taken, piece = [], 1 << 34
    while piece >= 1 << 16:
        try:
            taken.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            piece >>= 1
    try:
        many = chain("not in yet", 32)
        outcomes = backend.read(pool.batch(keys)).result(60)
        written = backend.write(pool.batch(many)).result(60)
        late = opened(tmp_path / "late")
        print("full device:", {o.name for o in outcomes}, {o.name for o in written}, late.decision)
        late.close()
        assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED}
        assert set(written) <= {Outcome.HIT, Outcome.FAILED}
    finally:
        taken.clear()
        torch.cuda.empty_cache()
    assert backend.stats().get("corrupt", 0) == 0
    assert read(backend, HostPool(space, 32), keys) == [Outcome.HIT] * 32
    if "device" in backend.capabilities.memory:
        assert read(backend, pool, keys) == [Outcome.HIT] * 32
    backend.close()


def test_a_forked_process(tmp_path: Path) -> None:
    backend, _, keys, pool = filled(tmp_path / "tier", GpuPool)
    asked = pool.batch(keys)
    child = os.fork()
    if child == 0:
        try:
            fine = backend.read(asked).result(5) == [Outcome.MISS] * 6
            fine &= backend.write(asked).result(5) == [Outcome.REJECTED] * 6
            own = opened(tmp_path / "child")
            fine &= own.capabilities.memory == ("host",) and "forked" in own.decision.why
            own.close()
            backend.close()
            os._exit(0 if fine else 1)
        except BaseException:
            os._exit(2)
    until = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert read(backend, pool, keys) == [Outcome.HIT] * 6
    backend.close()


HEAD = """
import sys, time
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, {root!r})
from storage_backends.base import Outcome
from tests.gds_cases import filled, opened, read
from tests.gpu.pool import GpuPool
from tests.pages import HostPool, chain
backend, space, keys, pool = filled(Path({folder!r}) / "tier", GpuPool)
"""


def in_a_process(folder: Path, script: str) -> str:
    text = HEAD.format(root=str(ROOT), folder=str(folder)) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_device_in_error(tmp_path: Path) -> None:
    """A kernel's wild address poisons the context for all: pages in device memory fail, those in host memory do not."""
    said = in_a_process(
        tmp_path,
        """
        from hicache_ext.cuda import open_device
        from hicache_ext import _cuda
        try:
            open_device().crc32c(np.array([64], np.uint64), np.array([65536], np.uint32), np.zeros(1, np.uint32), 0, 1)
        except _cuda.Failed as error:
            print("in error:", error)
        done = backend.read(pool.batch(keys)).result(60)
        print("device:", {one.name for one in done}, backend.stats()["gds_mode"], backend.stats()["gds_reason"])
        assert set(done) == {Outcome.FAILED}, done
        assert read(backend, HostPool(space, 6), keys) == [Outcome.HIT] * 6
        since = time.monotonic()
        backend.close()
        assert time.monotonic() - since < 8
        print("the host's pages are there")
        sys.stdout.flush()
        import os
        os._exit(0)
        """,
    )
    print(said)
    assert "in error: " in said
    assert "the host's pages are there" in said


def test_a_process_that_ends_with_all_of_it_open(tmp_path: Path) -> None:
    said = in_a_process(tmp_path, 'backend.read(pool.batch(keys))\nprint("ends")')
    assert said.endswith("ends\n")


def test_abi(tmp_path: Path) -> None:
    """Our declarations are those of the header that came with the library."""
    headers = [Path(path).parents[1] / "include" for path in libraries()[1:]]
    found = next((path for path in headers if (path / "cufile.h").exists()), None)
    cuda = Path("/usr/local/cuda/include")
    if found is None or not (cuda / "cuda.h").exists():
        pytest.skip("no header of cuFile's, or of CUDA's, on this machine")
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{found}", f"-I{cuda}"]
    done = subprocess.run([*command, ROOT / "tests" / "cufile_abi.cpp"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
