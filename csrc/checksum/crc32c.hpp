// CRC32C (Castagnoli) over plain memory, and nothing else: no Python, no I/O, no page format.
//
// The value is part of the on-disk format; the CPU only picks how it is computed. Every
// implementation here therefore gives the same number for the same bytes, and the tests hold each of
// them against the portable one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace hicache::checksum {

/// Continues `seed` (0 for a fresh checksum) over `length` bytes: crc(b, crc(a)) == crc(a + b).
using Crc32cFn = std::uint32_t (*)(const std::uint8_t* data, std::size_t length, std::uint32_t seed) noexcept;

struct Implementation {
    const char* name;
    Crc32cFn function;
};

/// What this CPU can run, best first; the portable one is always there and last. Decided once.
std::span<const Implementation> implementations() noexcept;

/// The first of `implementations()`.
const Implementation& active() noexcept;

}  // namespace hicache::checksum
