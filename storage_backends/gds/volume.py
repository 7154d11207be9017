"""Whether cuFile can learn what disk a directory is on: without that it takes no file there (its error 5027).

Belongs here: what cuFile looks up before it takes a file, and what to do where it is not there. Does not belong here:
trying cuFile (trial.py).

In every mode, compatibility mode too, cuFile asks libudev for the block device of a file's file system, and for what
udev has written down about it: ID_FS_USAGE and ID_FS_TYPE in /run/udev/data/bMAJOR:MINOR. Seen in cuFile 1.15 and 1.20.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

#: cuFile's code for a file that it does not take.
CODE = 5027


class Problem(NamedTuple):
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


def problem(directory: Path, udev: Path = Path("/run/udev/data"), system: Path = Path("/sys")) -> Problem | None:
    """None: nothing that is seen from here. OSError: no such directory."""
    number = os.stat(directory).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    if not (system / "dev" / "block" / name).exists():
        return Problem(
            f"{directory} is not on a block device (tmpfs, overlay, btrfs and network file systems are on none)",
            "use a directory on ext4 or xfs, in a container a mounted one",
        )
    if not udev.is_dir():
        return Problem(
            "there is no udev database, as in a container without it",
            "mount the host's /run/udev into the container, read-only (docker run -v /run/udev:/run/udev:ro)",
        )
    try:
        known = (udev / f"b{name}").read_text(errors="replace")
    except OSError:
        known = ""
    if "E:ID_FS_USAGE=" in known and "E:ID_FS_TYPE=" in known:
        return None
    return Problem(
        f"udev does not know the file system on block device {name}",
        "sudo udevadm trigger --action=change --subsystem-match=block, on the host",
    )
