"""Versions, the compiled parts, and whether SGLang finds the plugin.

Belongs here: what is installed and which of it we support. Does not belong here: importing an engine (seconds, and it
may fail for reasons of its own): versions come from the packages' metadata.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path

import hicache_ext
from hicache_ext.doctor.finding import Finding, error, ok, warning
from hicache_ext.sglang import versions
from hicache_ext.vllm import versions as vllm_versions
from storage_backends import checksum

PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "hicache_ext"

#: io_uring with what the engines use; and the first with deferred task work and STATX_DIOALIGN.
_KERNEL_OLDEST, _KERNEL_GOOD = (5, 6), (6, 1)
_REBUILD = "apt install g++, then reinstall hicache-ext from its source: pip install --force-reinstall --no-deps ."


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def kernel(release: str = "", container: bool | None = None) -> Finding:
    release = release or platform.release()
    inside = _in_container() if container is None else container
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    text = f"Linux {release}" + (", in a container" if inside else "")
    if numbers < _KERNEL_OLDEST:
        return warning("kernel", f"{text}: no io_uring that the engines can use", "run Linux 6.1 or newer")
    if numbers < _KERNEL_GOOD:
        return ok("kernel", f"{text}; from 6.1 on io_uring costs less CPU and tells the disk's alignment")
    return ok("kernel", text)


def _in_container() -> bool:
    if any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")) or "container" in os.environ:
        return True
    try:
        groups = Path("/proc/1/cgroup").read_text()
    except OSError:
        return False
    return any(word in groups for word in ("docker", "kubepods", "containerd", "libpod"))


def python() -> Finding:
    text = f"Python {platform.python_version()}, {sys.executable}"
    return ok("python", f"{text}; hicache-ext {hicache_ext.__version__}")


def sglang(found: str) -> Finding:
    """found: its version, "" where it is not installed."""
    oldest, newest = (".".join(map(str, bound)) for bound in (versions.OLDEST, versions.NEWEST))
    if not found:
        return ok("sglang", f"not installed in this environment (supported: {oldest} to {newest})")
    try:
        versions.check(found)
    except versions.UnsupportedVersion:
        return error("sglang", f"{found}; supported: {oldest} to {newest}", "pip install 'hicache-ext[sglang]'")
    return ok("sglang", f"{found} (supported: {oldest} to {newest})")


def vllm(found: str) -> Finding:
    oldest, newest = (".".join(map(str, bound)) for bound in (vllm_versions.OLDEST, vllm_versions.NEWEST))
    if not found:
        return ok("vllm", "not installed in this environment")
    try:
        vllm_versions.check(found)
    except vllm_versions.UnsupportedVersion:
        return error("vllm", f"{found}; supported: {oldest} to {newest}", "pip install 'hicache-ext[vllm]'")
    return ok("vllm", f"{found} (supported: {oldest} to {newest})")


def engines_installed(sglang_version: str, vllm_version: str) -> list[Finding]:
    if sglang_version or vllm_version:
        return []
    return [
        warning(
            "engine", "neither SGLang nor vLLM is installed in this environment",
            "run doctor with the Python that serves, or pip install 'hicache-ext[sglang]'",
        )
    ]  # fmt: skip


def libraries() -> Finding:
    found = {name: installed(name) or "not installed" for name in ("torch", "numpy", "liburing", "crc32c")}
    return ok("libraries", ", ".join(f"{name} {number}" for name, number in found.items()))


def checksums(implementation: str = "") -> Finding:
    name = implementation or checksum.implementation()
    if name.startswith("native"):
        return ok("checksums", f"CRC32C by {name}")
    return warning(
        "checksums", f"CRC32C by the {name}: more CPU a page than the compiled module",
        _REBUILD,
    )  # fmt: skip


def native_parts() -> Finding:
    try:
        from hicache_ext import _native
    except ImportError as problem:
        return warning(
            "native parts", f"not built: {problem}",
            _REBUILD,
        )  # fmt: skip
    info = _native.native_info()
    io_engine = "built" if info.get("io_engine") else "not built"
    return ok("native parts", f"checksums {info['crc32c']}, I/O engine {io_engine} ({info['compiler']})")


def plugin(found: list[EntryPoint], allowed: str, sglang_version: str) -> Finding:
    """Whether SGLang will load us. found: the group's entry points. allowed: SGLANG_PLUGINS, "" = all."""
    name = "sglang plugin"
    ours = [entry for entry in found if entry.name == PLUGIN_NAME]
    if not ours:
        text = f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}: SGLang will not know `hicache_ext`"
        fix = "pip install hicache-ext into SGLang's environment (a source tree on PYTHONPATH is not enough)"
        return error(name, text, fix) if sglang_version else warning(name, text, fix)
    if allowed and PLUGIN_NAME not in {part.strip() for part in allowed.split(",")}:
        return error(name, f"SGLANG_PLUGINS={allowed} leaves it out", f"export SGLANG_PLUGINS={allowed},{PLUGIN_NAME}")
    try:
        ours[0].load()
    except Exception as problem:  # whatever its import meets, SGLang would only log it
        return error(name, f"does not load: {type(problem).__name__}: {problem}", "pip install --force-reinstall it")
    return ok(name, f"visible to SGLang as {PLUGIN_NAME} ({ours[0].value})")


def probe() -> list[Finding]:
    sglang_version, vllm_version = installed("sglang"), installed("vllm")
    entries = list(entry_points(group=PLUGIN_GROUP))
    return [
        python(),
        kernel(),
        sglang(sglang_version),
        vllm(vllm_version),
        *engines_installed(sglang_version, vllm_version),
        plugin(entries, os.environ.get("SGLANG_PLUGINS", ""), sglang_version),
        libraries(),
        native_parts(),
        checksums(),
    ]
