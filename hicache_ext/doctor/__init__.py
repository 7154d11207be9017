"""Whether this machine, this install and this configuration can serve a tier: probes, each a few findings.

Belongs here: facts of the machine, what they mean for hicache-ext, and the command that changes them. Does not belong
here: printing (hicache_ext.cli.doctor), or measuring speed (hicache_ext.bench).
"""

from __future__ import annotations

from hicache_ext.doctor.checkup import checkup
from hicache_ext.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "checkup"]
