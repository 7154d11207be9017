"""vLLM's blocks by the block copies, over a driver that stands in for CUDA's: every layout, and a driver that refuses.

It shows that strides, units and calls fit together and what is said when the driver refuses; nothing of streams, events
or speed. On a GPU: tests/gpu/test_vllm_blocks.py.
"""

from __future__ import annotations

import pytest

from tests import stand_in

pytest.importorskip("torch")
pytest.importorskip("hicache_ext._cuda", reason="not built")

HEAD = """
    import ctypes, logging, sys
    driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    def set(**values):
        for name, value in values.items():
            ctypes.c_int.in_dll(driver, "stand_in_" + name).value = value
    def copies():
        return ctypes.c_long.in_dll(driver, "stand_in_copies").value
    from hicache_ext.device import copies as device_copies
    from tests import device_blocks as rig, past_blocks
    from tests.unit import test_vllm_device as cases
    logging.basicConfig(stream=sys.stdout, format="said: %(message)s")

    def opened(layout, page=None):
        return past_blocks.opened(layout, page, device_bytes=0)
"""

CASES = {
    "every layout": (
        """
        for layout in rig.LAYOUTS:
            for page in (None, 4, 16, 64):
                if page is None and layout.endswith("*"):
                    continue
                before = copies()
                with opened(layout, page) as case:
                    assert case.moves.copies == "block copies, pinned host memory", case.moves.copies
                    cases.there_and_back(case)
                assert copies() > before
        print("all there and back")
        """,
        ["all there and back"],
    ),
    "pinned memory refused": (
        """
        set(refuses_pinning=1)
        with opened("0.25 NHD", 64) as case:
            print(case.moves.copies)
            cases.there_and_back(case)
        """,
        ["is not pinned (cuMemHostRegister: error 2)", "block copies, pageable host memory"],
    ),
    "no device": (
        """
        set(devices=0)
        real = device_copies.TorchCopies
        def torch_copies(pools, staging):  # torch itself cannot copy what only says that it lies on a GPU
            for plane in (plane for pool in pools.values() for plane in pool.planes):
                object.__setattr__(plane, "buffer", getattr(plane.buffer, "tensor", plane.buffer))
            return real(pools, staging)
        device_copies.TorchCopies = torch_copies
        with opened("0.25 NHD", 64) as case:
            cases.there_and_back(case)
        """,
        ["no block copies (the CUDA driver finds no usable device"],
    ),
    "a copy that fails": (
        """
        with opened("0.25 NHD") as case:
            pages = case.pages("a", 0, 4, [3, 5, 7, 9])
            print(case.save(pages))
            set(fails_copies=1)
            print(case.load(pages), case.save(case.pages("b", 0, 2, [1, 2])))
            set(fails_copies=0)
            print(case.load(pages))
        """,
        [
            "Counter({'HIT': 4})",
            "([3, 5, 7, 9], [<Outcome.FAILED: 6>, <Outcome.FAILED: 6>, <Outcome.FAILED: 6>, <Outcome.FAILED: 6>])",
            "Counter({'dropped': 2})",
            "([], [<Outcome.HIT: 1>, <Outcome.HIT: 1>, <Outcome.HIT: 1>, <Outcome.HIT: 1>])",
        ],
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case printed."""
    return stand_in.run(tmp_path_factory.mktemp("cases"), HEAD, {name: script for name, (script, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_over_a_driver_that_stands_in(name: str, said: dict[str, str]) -> None:
    if name != "a copy that fails":  # there the failure is logged with its trace
        assert "Traceback" not in said[name], said[name]
    for part in CASES[name][1]:
        assert part in said[name], said[name]
