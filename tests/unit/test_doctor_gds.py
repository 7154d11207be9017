"""What `doctor` and `bench gds` say of GPU-direct storage, here and on machines that are better off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hicache_ext import cuda
from hicache_ext.cli import bench
from hicache_ext.config import Config, ConfigError
from hicache_ext.doctor import gds
from hicache_ext.doctor.checkup import checkup
from hicache_ext.doctor.finding import Level
from storage_backends.gds.decision import NO_STREAM, Decision, Mode, Way

DIRECT = Decision(Mode.GDS, "", "libcufile.so.0", "1.15", 0, "a GPU", Way.BATCH)
PLACE = gds.Place("nvme", "auto", "auto", None, (Path("/nvme"),))


@pytest.mark.parametrize(
    ("mode", "decision", "level", "fix"),
    [
        ("auto", DIRECT, Level.OK, ""),
        ("gds", DIRECT, Level.OK, ""),
        ("auto", replace(DIRECT, mode=Mode.COMPATIBILITY, why="no nvidia-fs"), Level.WARNING, "modprobe nvidia-fs"),
        ("gds", replace(DIRECT, mode=Mode.COMPATIBILITY, why="no nvidia-fs"), Level.ERROR, "mode: auto"),
        ("compatibility", replace(DIRECT, mode=Mode.COMPATIBILITY, why="mode: compatibility"), Level.OK, ""),
        ("staging", Decision(Mode.STAGING, "mode: staging"), Level.OK, ""),
        ("auto", Decision(Mode.STAGING, "cuFile cannot be loaded: libcufile.so.0"), Level.WARNING, "hicache-ext[gds]"),
        ("auto", Decision(Mode.STAGING, "no CUDA driver"), Level.WARNING, "nvidia-smi"),
        ("compatibility", Decision(Mode.STAGING, NO_STREAM), Level.WARNING, "way: calls"),
    ],
)
def test_a_decision_becomes_a_finding(mode: str, decision: Decision, level: Level, fix: str) -> None:
    found = gds.judge(replace(PLACE, mode=mode), decision)
    assert (found.name, found.level) == ("nvme: GPU", level)
    assert fix in found.fix
    assert bool(found.fix) == (level is not Level.OK)
    assert decision.why in found.text


def test_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "gds.yaml"
    file.write_text(f"tiers:\n  - type: gds\n    path: {tmp_path / 'tier'}\n    capacity: 64MiB\n    mode: staging\n")
    (found,) = [one for one in checkup(file, 60.0) if one.name == "gds: GPU"]
    assert found.level is Level.OK
    assert "pinned host memory" in found.text
    assert not (tmp_path / "tier").exists(), "doctor makes nothing"


def test_a_key_that_is_wrong_is_named(tmp_path: Path) -> None:
    tier = {"type": "gds", "path": str(tmp_path), "capacity": "64MiB"}
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.mode = 'fast'"):
        Config.load({"tiers": [{**tier, "mode": "fast"}]})
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.device = -1"):
        Config.load({"tiers": [{**tier, "device": -1}]})


def test_the_benchmark_without_a_gpu_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(_: int = 0) -> None:
        raise cuda.CudaUnavailable("no CUDA driver: libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(cuda, "open_device", none)
    done = CliRunner().invoke(bench.app, ["gds", "--quick", "--path", str(tmp_path)])
    assert done.exit_code == 2
    assert done.output.strip() == ("bench gds needs a GPU and cuFile: no CUDA driver: libcuda.so.1 cannot be loaded")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--way", "sideways"), ("--size", "much")])
def test_the_benchmark_names_a_wrong_option(option: str, value: str) -> None:
    done = CliRunner().invoke(bench.app, ["gds", option, value])
    assert done.exit_code == 2
    assert option in done.output
    assert value in done.output
