"""The wheel: what is in it, what must never be, and that it builds and works without a compiler.

What belongs here: packaging. Each build runs offline from the build requirements of this environment if
they are installed, else in pip's isolated environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """Builds a wheel of `source` into `target`; returns it with pip's output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", str(target), str(source)]
    if find_spec("scikit_build_core") and find_spec("nanobind") and source == ROOT:
        command.append("--no-build-isolation")
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    output = done.stdout + done.stderr  # pip shows what the build says on stderr
    assert done.returncode == 0, output[-8000:]
    (wheel,) = target.glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))[0]


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hicache_ext", "storage_backends"}
    assert any(name.endswith("LICENSE") and ".dist-info/" in name for name in names)
    assert "hicache_ext/py.typed" in names
    assert "storage_backends/base.py" in names
    for name in names:
        assert "patches" not in name, name
        assert "sgl_kernel" not in name, name
        assert "triton" not in name, name
        assert not name.endswith((".pth", ".cpp", ".hpp")), name
        assert "__pycache__" not in name, name
    assert "License-Expression: Apache-2.0" in metadata
    assert "hicache_ext = hicache_ext.sglang.plugin:register" in entry_points
    assert "hicache-ext = hicache_ext.cli.main:main" in entry_points


def test_core_dependencies_are_light(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        required = [line for line in archive.read(name).decode().splitlines() if line.startswith("Requires-Dist:")]
    core = [line for line in required if "extra ==" not in line]
    for heavy in ("torch", "sglang", "vllm", "liburing", "obstore", "redis", "nixl"):
        assert not any(heavy in line for line in core), core


@pytest.mark.parametrize("reason", [{"CC": "/bin/false", "CXX": "/bin/false"}, {"HICACHE_EXT_PURE": "1"}])
def test_without_a_compiler_the_wheel_is_pure_and_works(tmp_path: Path, reason: dict[str, str]) -> None:
    pure, output = build(ROOT, tmp_path / "wheel", **reason)
    assert pure.name.endswith("-py3-none-any.whl")
    if "CXX" in reason:
        assert "was left out: no hicache_ext._native" in output
    site = tmp_path / "site"
    with zipfile.ZipFile(pure) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(site)
    # The unpacked wheel stands before this checkout; -I would drop PYTHONPATH, so the meta path of an
    # editable install is emptied instead.
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Scikit' not in type(f).__name__]\n"
        "import hicache_ext; assert hicache_ext.__file__.startswith(sys.argv[1]), hicache_ext.__file__\n"
        "from storage_backends.checksum import crc32c, implementation\n"
        "from hicache_ext.cli.main import native_parts\n"
        "assert crc32c(b'123456789') == 0xE3069283\n"
        "print(implementation(), '|', native_parts()['checksums'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(site)],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("crc32c wheel")
    assert "left out" in done.stdout


def test_the_cpu_shim_is_a_distribution_of_its_own(tmp_path: Path) -> None:
    shim, _ = build(ROOT / "patches" / "sglang-cpu", tmp_path)
    with zipfile.ZipFile(shim) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "hicache_ext_sglang_cpu",
        "hicache_ext_sglang_cpu.pth",
        "sgl_kernel",
        "triton",
        "hicache_ext_sglang_cpu-0.1.0.dist-info",
    }
