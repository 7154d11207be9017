"""The example of a backend of somebody else's: installed, found, through the contract suite, and as a tier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hicache_ext.config import Config
from hicache_ext.store import TieredStore
from storage_backends.base import Outcome
from tests.pages import HostPool, chain, namespace, served

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_backend"
SPACE = namespace()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the example is installed."""
    pytest.importorskip("setuptools")
    target = tmp_path_factory.mktemp("installed")
    source = target / "source"  # setuptools builds in the source's own folder
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*command, target / "site", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / "site"


def test_it_passes_the_contract_suite_from_outside(installed: Path, tmp_path: Path) -> None:
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "contract"]
    options = ["--hicache-backend", "directory", "--hicache-options", '{"path": "{path}/pages"}']
    environment = {"PYTHONPATH": f"{installed}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*suite, "-k", "not custom_backend", *options], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("name", ["directory", "hicache_directory:DirectoryBackend"])
def test_it_serves_pages_through_a_cascade(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(installed if ":" not in name else EXAMPLE)
    pages = tmp_path / "pages"
    tiers = [{"type": "memory", "capacity": "4MiB"}, {"type": name, "name": "below", "path": str(pages)}]
    store = TieredStore.open(Config.load({"tiers": tiers}))
    keys = chain("a", 6)
    assert store.write(HostPool(SPACE, 6).write_batch(keys)).result(10) == [Outcome.HIT] * 6
    assert store.settled(10)
    store.close()

    again = TieredStore.open(Config.load({"tiers": tiers}))
    damaged = pages / SPACE.digest.hex() / keys[2].hex()
    raw = bytearray(damaged.read_bytes())
    raw[5000] ^= 1
    damaged.write_bytes(raw)
    swapped = pages / SPACE.digest.hex() / keys[4].hex()
    swapped.write_bytes((pages / SPACE.digest.hex() / keys[5].hex()).read_bytes())
    outcomes = served(again, SPACE, keys)
    assert [outcome == Outcome.HIT for outcome in outcomes] == [True, True, False, True, False, True]
    assert again.stats()["below"]["read_corrupt"] == 2
    again.close()
    del sys.modules["hicache_directory"]
