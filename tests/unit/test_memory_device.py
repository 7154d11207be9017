"""The memory tier's way past the host, over a driver that stands in for CUDA's (no GPU).

What a machine without a GPU can show: that the tier, csrc/memory and csrc/cuda fit together; that nothing but the page
that was asked for is served; what is done and said when the driver refuses. Real copies, streams and our kernels:
tests/gpu/test_memory_device.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import stand_in

pytest.importorskip("torch")
pytest.importorskip("hicache_ext._cuda", reason="not built")

from tests.memory_stand_in import CASES

SAID = {
    "both_routes_read_what_either_wrote": ["memory: device: pinned 256.0MiB, device 0 stand-in, in "],
    "a_device_that_fails_goes_out_of_use": [
        "memory: pages to or from the device failed: ",
        "memory: the device is out of use, pages go through host memory: ",
    ],
    "pinning_refused": ["memory: pages go to device 0 through host memory: 32.0MiB cannot be pinned"],
    "a_device_that_never_ends": ["memory: the device does not end its copies: "],
    "it_is_pinned_once_and_unpinned_before_it_is_unmapped": ["memory: device 0 is reached, not 1 as well"],
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case printed."""
    folder = stand_in.build(tmp_path_factory.mktemp("driver")).parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory_stand_in"], capture_output=True, text=True, timeout=300,
        cwd=stand_in.ROOT, env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, *said = re.split(r"^== (\w+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(said[::2], said[1::2], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_over_a_driver_that_stands_in(name: str, printed: dict[str, str]) -> None:
    text = printed[name]
    if "built without nvcc" in text and name != "no_kernels":
        pytest.skip("built without nvcc: nothing is verified on a device")
    assert f"{name}: ok" in text, text
    for line in SAID.get(name, []):
        assert text.count(line) == 1, text
