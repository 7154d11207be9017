"""The engines that `bench serve` starts itself: what each subject is, its launch line, its storage, its restarts.

Belongs here: SGLang's flags for a subject, and the folders of one. Does not belong here: the server process
(hicache_ext.cli.serving) and what it is asked (hicache_ext.bench.serve).

    ours, ours-NAME     our backend, with a configuration of the user's or a local tier in a folder of the run's
    stock-BACKEND       one of SGLang's own (`stock-file`, `stock-nixl`), its files in a folder of the run's
    recompute           no tiers below device memory
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hicache_ext.bench.machine import file_system
from hicache_ext.bench.serve_client import Client
from hicache_ext.bench.serve_disk import ram_backed
from hicache_ext.bench.serve_engines import Facts, SGLang
from hicache_ext.bench.serve_matrix import Tier
from hicache_ext.cli import cpu_server, tiny_model
from hicache_ext.cli.serving import Server, free_port
from hicache_ext.config import Config, ConfigError, TierConfig, read_file

START_LIMIT_S = 600.0
RECOMPUTE = "recompute"
_STOCK = "stock-"
_NAME = re.compile(r"(ours(-[\w.-]+)?|stock-[\w.]+|recompute)")


class SubjectError(ValueError):
    """A subject or launch line that cannot be used; one line."""


@dataclass(frozen=True)
class Subject:
    """name: in the rows. config: a file for our backend; None: a local tier of the run's own."""

    name: str
    config: Path | None = None

    @property
    def stock(self) -> str:
        """SGLang's backend, or an empty string."""
        return self.name.removeprefix(_STOCK) if self.name.startswith(_STOCK) else ""

    @property
    def tiers(self) -> frozenset[Tier]:
        """What the subject has."""
        memory = {Tier.NONE, Tier.DEVICE}
        if self.name == RECOMPUTE:
            return frozenset(memory)
        memory.add(Tier.HOST)
        return frozenset(memory | ({Tier.LOCAL} if self.config is None else _storage_tiers(self.config)))


def parse_subject(text: str) -> Subject:
    """`NAME` or `NAME=CONFIG`. Raises SubjectError."""
    name, _, config = text.partition("=")
    if not _NAME.fullmatch(name):
        raise SubjectError(
            f"{text!r} is no subject. Fix: write ours, ours-NAME=CONFIG, stock-BACKEND (as stock-file) or {RECOMPUTE}"
        )
    if config and not name.startswith("ours"):
        raise SubjectError(f"{text!r}: only ours takes a configuration. Fix: remove {'=' + config!r}")
    if not config:
        return Subject(name)
    path = Path(config).absolute()
    try:
        Config.load(path)
    except ConfigError as error:
        raise SubjectError(str(error)) from error
    return Subject(name, path)


#: Tiers on disks of this machine.
_LOCAL = {"local", "gds"}


def _storage_tiers(config: Path) -> set[Tier]:
    types = [tier.type for tier in Config.load(config).tiers]
    found = {Tier.LOCAL} if _LOCAL & set(types) else set()
    return found | ({Tier.REMOTE} if set(types) - _LOCAL - {"memory"} else set())


@dataclass
class Launched:
    """One subject's servers, one at a time, and what they store.

    flags: SGLang's, for all subjects; empty: the tiny model on the CPU. capacity: of a local tier of the run's own.
    """

    subject: Subject
    folder: Path
    flags: list[str]
    capacity: str = "8GiB"
    timeout_s: float = 300.0
    started: int = 0
    _server: Server | None = None
    _made: list[Path] = field(default_factory=list)

    def __enter__(self) -> Launched:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.subject.config is None:
            self.store = Path(tempfile.mkdtemp(prefix=f"{self.subject.name}-", dir=self.folder))
            self._made = [self.store]
        else:
            # A folder that was there before is the user's, and so is what it holds.
            paths = [Path(tier.options["path"]) for tier in self._tiers() if tier.type in _LOCAL]
            self._made = [path for path in paths if not path.exists()]
            self.store = paths[0] if paths else self.folder
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def on_cpu(self) -> bool:
        return not self.flags

    def start(self, progress: Callable[[str], None]) -> tuple[SGLang, Facts]:
        """A new server; raises ServerFailed or EngineError."""
        self.stop()
        self.started += 1
        port = free_port()
        log = self.folder / f"server-{self.subject.name}-{self.started}.log"
        self._server = Server(self.launch_line(port), log, port, self._environment())
        self._server.__enter__()
        progress(f"starting SGLang, its log is {log}")
        self._server.wait_until_up(START_LIMIT_S)
        engine = SGLang(Client(f"http://127.0.0.1:{port}", self.timeout_s))
        return engine, engine.facts()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def forget_local(self) -> str:
        """Empty the local tiers, so that only a remote one has pages; or why that is not done."""
        paths = [Path(tier.options["path"]) for tier in self._tiers() if tier.type in _LOCAL]
        for path in paths:
            if path not in self._made:
                return f"{path} was there before this run and is not emptied. Fix: name a new folder"
            shutil.rmtree(path, ignore_errors=True)
        return ""

    def describe(self) -> dict[str, object]:
        """What the result should say of where this subject stores."""
        if self.subject.name == RECOMPUTE:
            return {}
        mount = file_system(self.store if self.store.exists() else self.store.parent)
        return {"file_system": mount, "ram_backed": ram_backed(mount)}

    def launch_line(self, port: int) -> list[str]:
        base = self.flags or cpu_server.flags(tiny_model.make(self.folder / "model"))
        line = [sys.executable, "-m", "sglang.launch_server", "--skip-server-warmup", "--enable-metrics"]
        if self.subject.name == RECOMPUTE:
            return [*line, *base, "--host", "127.0.0.1", "--port", str(port)]
        line += ["--enable-hierarchical-cache", "--hicache-storage-prefetch-policy", "wait_complete"]
        # What the user gives stands behind what is only a default here, and before what the run depends on.
        storage = ["--hicache-storage-backend", self.subject.stock or "hicache_ext"]
        storage += ["--hicache-storage-backend-extra-config", self._extra_config(_page_tokens(base))]
        return [*line, *base, *storage, "--host", "127.0.0.1", "--port", str(port)]

    def _extra_config(self, page_tokens: int) -> str:
        # Short prompts are worth asking for here: the lengths at which that does not pay are what is looked for.
        common = {"prefetch_threshold": page_tokens}
        if self.subject.stock == "nixl":  # a disk that is 80 % full would lose the pages that are to be read back
            return json.dumps({**common, "l3_cleaner_enabled": False})
        if self.subject.stock:
            return json.dumps(common)
        if self.subject.config is not None:
            values = {**common, **read_file(self.subject.config)}
        else:
            values = {**common, "tiers": [{"type": "local", "path": str(self.store), "capacity": self.capacity}]}
        path = self.folder / f"{self.subject.name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return f"@{path}"

    def _environment(self) -> dict[str, str]:
        base = cpu_server.environment() if self.on_cpu else {"PATH": cpu_server.path_with_ninja()}
        if self.subject.stock:
            for backend in ("FILE", "NIXL"):
                base[f"SGLANG_HICACHE_{backend}_BACKEND_STORAGE_DIR"] = str(self.store)
        return base

    def _tiers(self) -> list[TierConfig]:
        return list(Config.load(self.subject.config).tiers) if self.subject.config is not None else []


def split_flags(text: str) -> list[str]:
    """The words of a launch line. Raises SubjectError for flags that the run must choose itself."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SubjectError(f"--launch: {error}") from error
    own = {"--host", "--port", "--hicache-storage-backend", "--hicache-storage-backend-extra-config"}
    if taken := sorted(own & {word.partition("=")[0] for word in words}):
        raise SubjectError(f"--launch: {', '.join(taken)}: chosen for each subject. Fix: leave it out")
    if not any(word.partition("=")[0] in ("--model-path", "--model") for word in words):
        raise SubjectError("--launch: no --model-path. Fix: give the flags that the subjects have in common")
    return words


def _page_tokens(flags: list[str]) -> int:
    for here, following in zip(flags, [*flags[1:], ""], strict=True):
        if here == "--page-size":
            return int(following)
        if here.startswith("--page-size="):
            return int(here.partition("=")[2])
    return 1
