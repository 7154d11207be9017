"""Fingerprints of files: a model's configuration, its weights, a LoRA adapter. Plain functions of paths.

Belongs here: where a model's files are, and what in them decides whether it computes the same KV. Does not belong
here: an engine's arguments.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hicache_ext.config import ConfigError

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Keys of a config.json that name the file or the writer, not the computation.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "name_or_path"})
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


def locate(model_path: str, revision: str | None, cache: str | None = None) -> Path | None:
    """The local folder (or GGUF file) of a model path or Hugging Face name; None where there is none."""
    path = Path(model_path).expanduser()
    if path.exists():
        return path.resolve()
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model_path, "config.json", cache_dir=cache or None, revision=revision)
    except Exception:  # not installed, or not a valid repository name
        return None
    # The file is a link into blobs/; its folder is the snapshot, whose name is the commit.
    return Path(found).parent if isinstance(found, str) else None


def digest(value: object) -> str:
    """sha256 (hex) of a JSON value, keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def model_config(path: Path) -> Any:
    """What config.json in `path` says of the computation; a GGUF file stands for itself. Raises OSError, ValueError."""
    if path.is_file():
        return {"gguf": weights([path])}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"config": _relevant(config)}
    # Some models keep their quantisation beside the config; it changes what is computed.
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (path / name).is_file():
            result[name] = json.loads((path / name).read_text(encoding="utf-8"))
    return result


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _relevant(item) for key, item in value.items() if key not in _IRRELEVANT}
    if isinstance(value, list):
        return [_relevant(item) for item in value]
    return value


def snapshot_commit(path: Path) -> str:
    """The commit when `path` is a snapshot folder of the Hugging Face cache, else ""."""
    if path.parent.name == "snapshots" and _SNAPSHOT.fullmatch(path.name):
        return path.name
    return ""


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model folder (or the one file), by name. Empty when there are none."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file())


def weights(files: Iterable[Path]) -> str:
    """From names, sizes, modification times and a few samples of the content: cheap, and changes with every write."""
    facts = []
    for file in files:
        status = file.stat()
        facts.append([file.name, status.st_size, status.st_mtime_ns, _samples(file, status.st_size)])
    return "files:" + digest(facts)


def _samples(file: Path, size: int) -> str:
    """Digest of 4 KiB at eight places: tells apart files that were copied with equal sizes and times."""
    hasher = hashlib.sha256()
    with file.open("rb") as source:
        for part in range(8):
            source.seek(max(0, size - 4096) * part // 7)
            hasher.update(source.read(4096))
    return hasher.hexdigest()


def weights_of(path: Path) -> str:
    """The weights of a model folder: its snapshot's commit, else its files. Raises ConfigError where it has none."""
    commit = snapshot_commit(path)
    if commit:
        return f"commit:{commit}"
    files = weight_files(path)
    if not files:
        raise ConfigError(
            f"model.path = {str(path)!r}: holds no weight files. Fix: set `model.revision` to a name for these weights"
        )
    return weights(files)


def tensor_names(path: Path) -> frozenset[str] | None:
    """The tensors of a safetensors model folder; None where they cannot be listed cheaply."""
    files = weight_files(path)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    names: set[str] = set()
    try:
        for file in files:
            with file.open("rb") as source:
                (length,) = struct.unpack("<Q", source.read(8))
                if length > 1 << 28:
                    return None
                names.update(json.loads(source.read(length)))
    except (OSError, ValueError, struct.error):
        return None
    names.discard("__metadata__")
    return frozenset(names)


def adapter(path: Path) -> str:
    """A LoRA adapter's content: configuration and weight files, byte by byte (they are small). Raises OSError."""
    hasher = hashlib.sha256()
    found = False
    for file in sorted(path.glob("*")):
        if file.name == "adapter_config.json" or file.suffix in WEIGHT_SUFFIXES:
            found = True
            hasher.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as source:
                while block := source.read(1 << 20):
                    hasher.update(block)
    if not found:
        raise FileNotFoundError(f"{path} holds no LoRA adapter")
    return hasher.hexdigest()


def adapter_content(path: str) -> str:
    """Content digest of a LoRA adapter's folder; one of this run only where the files cannot be read."""
    try:
        found = locate(path, None)
        if found is not None:
            return adapter(found)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "adapter_config.json")
        if isinstance(cached, str):
            return adapter(Path(cached).parent)
    except Exception as error:
        logger.warning("LoRA adapter %s cannot be read (%s): its pages will not be reused after a restart", path, error)
    return "unread:" + os.urandom(16).hex()
