// Reading slot headers in bulk: which pages lie in an extent, by what its slots say of themselves.
//
// Belongs here: reads of headers, several at a time, and judging them (io/slot.hpp). Does not belong here: Python
// (scan/module.cpp), or what becomes of the pages found. storage_backends/local/headers.py has the same in Python.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "io/slot.hpp"

namespace hicache::scan {

/// A slot with a whole header. The layout is Python's (storage_backends.local.headers.FOUND).
struct Found {
    std::uint32_t slot;
    std::uint32_t zero;
    io::SlotPage page;
};
static_assert(sizeof(Found) == 104);

/// The slots of these whose headers are whole, in their order. Slot n begins at byte base + n * slot_bytes of `fd`.
///
/// threads: reads at a time, the calling thread among them. cancelled: a byte that ends the work when it becomes 1, or
/// null. What cannot be read has no page. Memory: one header per thread, at most 1 MiB each.
std::vector<Found> headers(int fd, std::uint64_t base, std::uint64_t slot_bytes, std::span<const std::uint32_t> slots,
                           unsigned threads, const std::uint8_t* cancelled);

}  // namespace hicache::scan
