// A copy that computes the CRC32C of what it copies: memory is passed once.
//
// Belongs here: the copy. Does not belong here: the checksum by itself (crc32c.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hicache::checksum {

/// Copies `length` bytes, which must not overlap, and gives the CRC32C of the copy: what is checked is what was stored,
/// even where somebody else writes to `from` meanwhile.
///
/// stream: the copy is not read again soon, and need not take the caches from what is. Its bytes are visible to other
/// threads in the order of the program all the same.
std::uint32_t copy(std::uint8_t* to, const std::uint8_t* from, std::size_t length, bool stream) noexcept;

}  // namespace hicache::checksum
