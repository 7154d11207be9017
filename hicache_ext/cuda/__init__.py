"""Blocks between paged device pools and page buffers, on a GPU.

Belongs here: what a layout is as addresses (layouts), which way a copy takes (ways), copying (copier). Does not belong
here: engines' pools and their names (adapters), stores, or anything of torch: memory comes as addresses, streams come
as the numbers of their handles (torch: `stream.cuda_stream`).
"""

from __future__ import annotations

from hicache_ext.cuda.copier import Copier, CopyError, CudaUnavailable, LayerEvents, open_device
from hicache_ext.cuda.layouts import BlockShape, Side
from hicache_ext.cuda.ways import Way

__all__ = ["BlockShape", "Copier", "CopyError", "CudaUnavailable", "LayerEvents", "Side", "Way", "open_device"]
