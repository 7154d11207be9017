// A slot's bytes: sealing a page before it is written, and judging one that was read. Pure functions over memory.
//
// Belongs here: the part of the on-disk format (storage_backends/format.py, version 1) that must run where
// the bytes move. Does not belong here: I/O, or headers as a whole (Python prepares them, checksums left 0).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace hicache::io {

/// What a page turned out to be. The numbers are Python's (storage_backends.local.slots.Verdict).
enum class Verdict : std::uint8_t {
    kUnchecked = 0,  // not a slot, a write, or an error: `moved` says all there is
    kValid = 1,
    kOtherPage = 2,  // a good header of another page
    kDamaged = 3,    // a bad header, a bad checksum, or less than a page
};

/// What all pages of a batch share.
struct SlotShape {
    std::array<std::uint8_t, 16> name_space{};
    std::uint64_t header_bytes = 0;
    std::vector<std::uint64_t> lengths;  // bytes of each buffer of a page

    std::uint64_t payload_bytes() const noexcept;
    /// Whether a header of this size can hold the checksums: `seal` writes there without another look.
    bool fits() const noexcept;
};

/// What a slot's header says of its page. The layout is Python's (storage_backends.local.headers.FOUND).
struct SlotPage {
    std::uint64_t generation;
    std::uint64_t time_ns;
    std::array<std::uint8_t, 16> name_space;
    std::array<std::uint8_t, 32> key;
    std::array<std::uint8_t, 32> parent;
};

/// How long a header of which the first 4096 bytes are there says that it is; 0: it does not begin as one.
std::uint64_t claimed_header_bytes(const std::uint8_t* header) noexcept;

/// Whether a header of which `room` bytes are there is whole, and its page fits a slot of this size.
bool describe(const std::uint8_t* header, std::uint64_t room, std::uint64_t slot_bytes, SlotPage& page) noexcept;

/// Puts the payload's checksums and the header's own into a header that has zeroes there.
/// payload: where each of the shape's buffers lies.
void seal(const SlotShape& shape, std::uint8_t* header, std::span<const std::uint8_t* const> payload) noexcept;

/// As seal, for a header in which the payload's checksums are already.
void seal_header(const SlotShape& shape, std::uint8_t* header) noexcept;

/// Where the payload's checksums lie in a header of this shape: one u32 for every chunk.
std::uint64_t checksums_at(const SlotShape& shape) noexcept;

/// Judges a header alone: kValid where it is whole and of the page that was asked for.
Verdict verify_header(const SlotShape& shape, const std::uint8_t* key, const std::uint8_t* header) noexcept;

/// Judges a slot of which `moved` bytes arrived. key: 32 bytes. Reads no length that it has not checked.
Verdict verify(const SlotShape& shape, const std::uint8_t* key, const std::uint8_t* header,
               std::span<const std::uint8_t* const> payload, std::uint64_t moved) noexcept;

}  // namespace hicache::io
