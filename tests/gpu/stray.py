"""A checksum that reads 16 bytes too many: what compute-sanitizer must find, or its silence means nothing.

`make sanitize-gpu` runs this after the tests and wants a failure. No test, so that pytest leaves it alone.
"""

from __future__ import annotations

import numpy as np
import torch

from hicache_ext.cuda import open_device

data = torch.zeros(4096, dtype=torch.uint8, device="cuda")
out = np.zeros(1, np.uint32)
stream = torch.cuda.current_stream().cuda_stream
open_device().crc32c(np.array([data.data_ptr()], np.uint64), np.array([4096 + 16], np.uint32), out, stream, 1)
print("read past the end:", hex(int(out[0])))
