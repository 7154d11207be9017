"""The whole check-up: which probes, in which order, and what they add up to.

Belongs here: putting probes together. Does not belong here: a probe.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hicache_ext.config import Config, ConfigError, TierConfig, read_file
from hicache_ext.doctor import engines, gds, memory, server, share, shared_memory, sharing, software, tier
from hicache_ext.doctor.finding import Finding, error, ok
from hicache_ext.doctor.isolation import Answer, Call, ask
from storage_backends.local.engine import PREFERENCE

_SECONDS = 10.0
_TOO_LARGE = re.compile(r"\.capacity = .*the disk has ")
_SILENT = "look whether its server answers: hicache-ext config check FILE"
_HUNG_DISK = "look for a disk or a mount that does not answer: sudo dmesg | tail; cat /proc/mounts"
_NO_MEMORY = "cat /proc/meminfo"


def checkup(config: Path | None = None, seconds: float = _SECONDS) -> list[Finding]:
    """Everything that can be told, about this machine and, with a configuration, about its tiers.

    seconds: limit of each of the two rounds; the probes of a round run at once, each in a process of its own.
    """
    places = _Places()
    findings: list[Finding] = []
    if config is None:
        findings.append(ok("configuration", "none given: tiers are not checked (--config FILE)"))
    else:
        (known,) = ask([Call(partial(_places, config), seconds, _Places)])
        places = known.value or places
    probes: list[tuple[str, Callable[[], Any], str]] = [
        ("software", software.probe, "python -m pip check"),
        ("memory", memory.probe, "cat /proc/self/status"),
        *[(f"{place.label}: path", partial(tier.probe, place), _HUNG_DISK) for place in places.disks],
        *[(f"{place.label}: path", partial(share.probe, place), _HUNG_DISK) for place in places.shares],
        *[(f"{place.label}: memory", partial(shared_memory.probe, place), _NO_MEMORY) for place in places.regions],
        *[(f"{place.label}: GPU", partial(gds.probe, place), "nvidia-smi") for place in places.on_gpus],
    ]
    if config is not None:
        probes.insert(0, ("configuration", partial(configuration, config), _HUNG_DISK))
        probes += [
            (f"{label}: server", partial(server.probe, config, number), _SILENT) for number, label in places.servers
        ]
    calls = [Call(partial(_try_engine, name), seconds, engines.Trial) for name in PREFERENCE]
    answers = ask(calls + [Call(probe, seconds, list[Finding]) for _, probe, _ in probes])
    tried = {name: _engine_answer(answers[i]) for i, name in enumerate(PREFERENCE)}
    for (name, _, fix), answer in zip(probes, answers[len(PREFERENCE) :], strict=True):
        findings += [error(name, answer.problem, fix)] if answer.problem else answer.value
        if name == "memory":
            findings += engines.judge(tried, {place.engine for place in places.disks})
    return findings


def configuration(file: Path) -> list[Finding]:
    """Whether the engines will accept the file."""
    try:
        config = Config.load(file)
    except ConfigError as problem:
        findings = []
        for line in str(problem).splitlines():
            text, _, fix = line.partition(". Fix: ")
            if not _TOO_LARGE.search(text):  # the tier's own probe says that, with what is there
                findings.append(error("configuration", text, fix))
        return findings
    tiers = ", ".join(f"{chosen.label} ({chosen.type})" for chosen in config.tiers)
    return [ok("configuration", f"{file}: valid; tiers, fast to slow: {tiers}"), *sharing.probe(config)]


@dataclass
class _Places:
    """What a configuration's tiers use. servers: of tiers that have one, number and name."""

    disks: list[tier.Place] = field(default_factory=list)
    shares: list[share.SharePlace] = field(default_factory=list)
    regions: list[shared_memory.Place] = field(default_factory=list)
    servers: list[tuple[int, str]] = field(default_factory=list)
    on_gpus: list[gds.Place] = field(default_factory=list)


def _places(file: Path) -> _Places:
    """Of a file as far as it can be understood; `configuration` says what is wrong with the rest."""
    found = _Places()
    try:
        listed = read_file(file).get("tiers")
    except ConfigError:
        return found
    for number, values in enumerate(listed if isinstance(listed, list) else []):
        try:
            chosen = TierConfig.model_validate(values)
            found.disks += _disks(chosen)
            found.shares += _shares(chosen)
            found.regions += shared_memory.places(chosen)
            found.on_gpus += gds.places(chosen)
            found.servers += [(number, chosen.label)] if server.has_server(chosen) else []
        except ValueError:
            continue
    return found


def _shares(chosen: TierConfig) -> list[share.SharePlace]:
    """The place of one tier; none where it is not on a share."""
    from storage_backends.registry import backend_class
    from storage_backends.shared_fs import SharedFsBackend

    backend = backend_class(chosen.type)
    if not issubclass(backend, SharedFsBackend):
        return []
    options = backend.Options.model_validate(chosen.options)
    assert isinstance(options, SharedFsBackend.Options)
    return [share.SharePlace(chosen.label, options.path, options.mount, int(options.capacity))]


def _disks(chosen: TierConfig) -> list[tier.Place]:
    """The places of one tier; none where it is not local."""
    from storage_backends.local import LocalBackend
    from storage_backends.registry import backend_class

    backend = backend_class(chosen.type)
    if not issubclass(backend, LocalBackend):
        return []
    options = backend.Options.model_validate(chosen.options)
    assert isinstance(options, LocalBackend.Options)
    places = options.places
    names = [chosen.label] if len(places) == 1 else [f"{chosen.label} disk {i}" for i in range(len(places))]
    return [
        tier.Place(
            name,
            path,
            capacity,
            options.engine,
            tuple(other for other in places if other[0] != path),
            options.metadata,
        )
        for name, (path, capacity) in zip(names, places, strict=True)
    ]


def _try_engine(name: str) -> engines.Trial:
    return engines.explain(engines.attempt(name))


def _engine_answer(answer: Answer) -> engines.Trial:
    if not answer.problem:
        assert isinstance(answer.value, engines.Trial)
        return answer.value
    if answer.problem == "ended by SIGSYS":
        fix = engines.io_uring_fix("", "", "2")
        return engines.Trial("io_uring is forbidden here, on pain of death (seccomp profile with SCMP_ACT_KILL)", fix)
    return engines.Trial(answer.problem, "report this")
