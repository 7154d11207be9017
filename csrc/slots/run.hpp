// Runs of neighbouring slots between a file and memory, in one call each: sealed and written, or read and judged.
//
// For whoever has threads of his own that may wait for a file system; csrc/io is for those who have not. Calls move about
// as much as a device wants at a time, so that a page is checksummed shortly before it leaves, and looked at while it is
// warm; several threads keep the device at work meanwhile.
//
// Belongs here: blocking transfers of slots. Does not belong here: what a slot's bytes mean (io/slot.hpp).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "io/slot.hpp"

namespace hicache::slots {

/// n slots of a file, and where their pages lie in memory.
///
/// headers: the first of n headers, `stride` bytes from one to the next. payload: of each page its buffers. pad: memory for
/// what follows a page in its slot (zeroes when it is written; somebody's to lose when it is read); none: it follows the
/// payload in memory too, where whole slots lie. What is in one piece in memory is moved in one.
struct Run {
    int fd = -1;
    std::uint64_t offset = 0;
    std::uint64_t slot_bytes = 0;
    io::SlotShape shape;
    std::uint8_t* headers = nullptr;
    std::uint64_t stride = 0;
    std::vector<std::uint8_t*> payload;
    std::uint8_t* pad = nullptr;

    std::size_t pages() const noexcept { return shape.lengths.empty() ? 0 : payload.size() / shape.lengths.size(); }
    std::uint8_t* header(std::size_t page) const noexcept { return headers + page * stride; }
    std::span<std::uint8_t* const> buffers(std::size_t page) const noexcept {
        return {payload.data() + page * shape.lengths.size(), shape.lengths.size()};
    }
};

/// Puts checksums into the headers, in which all else is.
void seal(const Run& run) noexcept;

/// Judges the pages that are in memory. keys: 32 bytes a page.
void judge(const Run& run, const std::uint8_t* keys, std::uint8_t* verdicts) noexcept;

struct Written {
    std::size_t pages;  // that are in the file, whole, from the first one on
    int error;          // errno of what stopped the others, or 0
};

/// Seals the pages and writes them, until one cannot be written.
Written write(const Run& run);

/// Reads the pages and judges them. errors: of each page an errno, or 0. What is behind the end of the file is damaged.
void read(const Run& run, const std::uint8_t* keys, std::uint8_t* verdicts, std::int32_t* errors);

}  // namespace hicache::slots
