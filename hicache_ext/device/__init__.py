"""Pages between a device's pools and slots in pinned host memory, for every engine whose KV lies on a device.

Belongs here: planes (planes), slots (slots), the two ways of copying between them (copies). Does not belong here:
engines' pools, or which pages; `hicache_ext.cuda` knows how a GPU copies, and nothing of torch.
"""
