"""NIXL itself: which of its builds is used here, whether it is new enough, and whether its GPU plugins may be touched.

Belongs here: everything that is decided before an agent exists. Does not belong here: the agent.

There is a build for each major version of CUDA (`nixl-cu12`, `nixl-cu13`), and a process can load only one of them.
Before 1.5.1 a read that came short was reported as done, with old bytes in the rest of the memory.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from storage_backends.base import OptionError

OLDEST = (1, 5, 1)
#: Builds by the name of their module, the first ones first where nothing decides; OBJ of cu13 wants another library.
_BUILDS = {"nixl_cu12": ("nixl-cu12", 12), "nixl_cu13": ("nixl-cu13", 13)}
_PROBE_SECONDS = 20.0
#: In a process of its own, since a driver that is half there can block for ever.
_PROBE = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int()
status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
print(f"cuInit: error {status}" if status else "" if count.value else "there is no device")
"""


def build(needs_gpu: bool) -> str:
    """The module of the build to use here: what is loaded already, else what matches CUDA here, else any.

    needs_gpu: only what matches will do. Raises OptionError: none installed, too old, or of another CUDA.
    """
    installed = {name: _version(package) for name, (package, _) in _BUILDS.items()}
    installed = {name: found for name, found in installed.items() if found}
    if not installed:
        raise OptionError("type", "nixl", "NIXL is not installed", "pip install 'hicache-ext[nixl]'")
    major = cuda_major()
    matching = [name for name, (_, cuda) in _BUILDS.items() if cuda == major and name in installed]
    loaded = [name for name in _BUILDS if sys.modules.get(f"{name}._bindings") is not None]
    name = [*loaded, *matching, *installed][0]
    package = _BUILDS[name][0]
    if needs_gpu and major is not None and _BUILDS[name][1] != major:
        why = "is loaded by another part of this process" if loaded else "is what is installed"
        raise OptionError(
            "type", "nixl", f"CUDA {major} is used here and {package} {why}; only one can be loaded",
            f"pip uninstall {package}; pip install nixl-cu{major}",
        )  # fmt: skip
    found = installed.get(name, "")
    if _numbers(found) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OptionError(
            "type", "nixl", f"{package} {found} reports success where a read came short, and leaves old bytes",
            f"pip install '{package}>={oldest}'",
        )  # fmt: skip
    return name


def load(needs_gpu: bool) -> Any:
    """NIXL's Python interface, of the build that fits. Raises OptionError."""
    name = build(needs_gpu)
    # It logs every failed transfer; those are counted here and said once. It reads the variable when it is loaded.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    try:
        return importlib.import_module(f"{name}._api")
    except Exception as error:  # its libraries are picky about their surroundings
        raise OptionError(
            "type", "nixl", f"{_BUILDS[name][0]} does not load: {error}", "reinstall it, or use another tier"
        ) from None


def described(api: Any) -> str:
    """Package and version, for logs and statistics."""
    package = _BUILDS[api.__name__.partition(".")[0]][0]
    return f"{package} {_version(package)}"


def cuda_major() -> int | None:
    """The major version of CUDA that this process uses, or that torch was built for; None where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return _major(getattr(torch.version, "cuda", None))
    try:
        loaded = re.search(
            r"libcudart\.so\.(\d+)", Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        )
    except OSError:
        loaded = None
    return int(loaded[1]) if loaded else _major(_cuda_of_torch_on_disk())


def require_gpu(plugin: str) -> None:
    """OptionError unless there is a driver with a device: without one, cuFile spins for ever when it is opened."""
    problem = "there is no NVIDIA driver" if not Path("/dev/nvidiactl").exists() else _driver_problem()
    if problem:
        raise OptionError("plugin", plugin, f"needs a GPU: {problem}", "plugin: POSIX needs none")


@lru_cache(maxsize=1)
def _driver_problem() -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the driver did not answer within {_PROBE_SECONDS:.0f} s"
    except OSError as error:
        return f"the driver could not be asked: {error}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"the probe ended with {done.returncode}"])[-1]
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _major(text: object) -> int | None:
    found = re.match(r"\d+", str(text)) if text else None
    return int(found[0]) if found else None


def _cuda_of_torch_on_disk() -> str | None:
    """What torch was built for, without importing it: that takes seconds."""
    try:
        spec = find_spec("torch")
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    except (ImportError, ValueError, OSError):
        return None
    found = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None
