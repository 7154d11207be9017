// Where things lie in a region of shared memory. Version 1. All integers are the machine's own.
//
//   region   +------------+---------+-------+-------+----------+----------+-----+
//            | superblock | extents | table | marks | extent 0 | extent 1 | ... |     the extents start at a multiple of 2 MiB
//            +------------+---------+-------+-------+----------+----------+-----+
//
//   extent   slots, one after the other, each at a multiple of 4096: the slot header of storage_backends/format.py (its
//            generation is 0 here), then the page's buffers, packed.
//   extents  one `Extent` each. control: state (2 bits), owner (14), generation (48).
//   table    buckets of eight words, 0 = empty: tag (20 bits), the extent's generation (14, its lowest), extent (16),
//            where in it the slot begins, in units of 4096 (14).
//   marks    a byte for every unit of every extent: `Mark` where a slot begins there, else 0.
//
// Belongs here: numbers and their packing. Does not belong here: what is done with them (region.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

namespace hicache::memory {

constexpr std::uint32_t kVersion = 1;
constexpr char kMagic[8] = {'H', 'I', 'C', 'M', 'E', 'M', 'R', 'Y'};
constexpr std::uint64_t kUnit = 4096;
constexpr std::uint64_t kHuge = 2u << 20;
constexpr std::uint64_t kMinExtent = 64u << 10, kMaxExtent = 64u << 20;
constexpr std::uint64_t kFewExtents = 16, kExtents = 64;  // 64 where each then holds several large pages, else 16
constexpr std::uint64_t kLargeExtent = 16u << 20;
constexpr std::uint64_t kMostExtents = 1u << 16;
constexpr std::uint64_t kBytesPerEntry = 8192;  // the smallest slot: one unit of header, one of page
constexpr unsigned kYouth = 4;  // what was sealed within the last quarter of the extents goes after all others
constexpr unsigned kBucket = 8;
constexpr unsigned kMostOwners = 1u << 10;

using Word = std::uint64_t;

enum class State : std::uint64_t {
    kFree = 0,     // nothing in it
    kOpen = 1,     // its owner writes pages into it
    kSealed = 2,   // nobody writes into it until it is claimed
    kClaimed = 3,  // its owner is emptying it
};

enum class Mark : std::uint8_t { kNone = 0, kStored = 1, kUsed = 2 };

struct Control {
    Word word;
    State state() const noexcept { return static_cast<State>(word & 3); }
    unsigned owner() const noexcept { return static_cast<unsigned>(word >> 2 & 0x3fff); }
    std::uint64_t generation() const noexcept { return word >> 16; }
    static Control of(State state, unsigned owner, std::uint64_t generation) noexcept {
        return {static_cast<Word>(state) | Word{owner} << 2 | generation << 16};
    }
};

/// Where a slot is, and of which life of its extent.
struct Place {
    std::uint32_t extent;
    std::uint32_t unit;
    std::uint64_t generation;
};

constexpr Word kPlaceBits = (Word{1} << 44) - 1;

inline Word pack(std::uint32_t tag, const Place& place) noexcept {
    return Word{tag} << 44 | (place.generation & 0x3fff) << 30 | Word{place.extent} << 14 | place.unit;
}

struct Extent {
    std::atomic<Word> control;
    std::atomic<std::uint64_t> sequence;  // when it was sealed or spared, among all: the lowest goes first
    std::atomic<std::int64_t> pages;      // for statistics, and to prefer empty ones: a death may leave it wrong
    std::atomic<std::int64_t> bytes;
    std::atomic<std::uint64_t> born;  // which of all sealings was its own
    std::uint64_t reserved[3];
};
static_assert(sizeof(Extent) == 64 && std::atomic<Word>::is_always_lock_free);

struct Superblock {
    char magic[8];
    std::uint32_t version;
    std::uint32_t page_format;  // of the slots' headers
    std::uint64_t file_bytes, extent_bytes, extents, buckets;
    std::uint64_t extents_at, table_at, marks_at, data_at;
    std::atomic<std::uint64_t> sequence, seals;
    std::atomic<std::uint64_t> changes;  // grows when a page goes
};
static_assert(sizeof(Superblock) <= kUnit);

struct Geometry {
    std::uint64_t file_bytes, extent_bytes, extents, buckets;
    std::uint64_t extents_at, table_at, marks_at, data_at;

    std::uint64_t units() const noexcept { return extent_bytes / kUnit; }

    static std::uint64_t round_up(std::uint64_t value, std::uint64_t step) noexcept {
        return (value + step - 1) / step * step;
    }

    /// For `capacity` bytes of slots; extents is 0 where that is too little or too much.
    static Geometry of(std::uint64_t capacity) noexcept {
        Geometry g{};
        const std::uint64_t few = std::min(capacity / kFewExtents, kLargeExtent), many = capacity / kExtents;
        g.extent_bytes = std::clamp(std::max(few, many) / kMinExtent * kMinExtent, kMinExtent, kMaxExtent);
        g.extents = capacity / g.extent_bytes;
        if (g.extents < 4 || g.extents > kMostExtents) g.extents = 0;
        g.buckets = std::bit_ceil(2 * (g.extents * g.extent_bytes / kBytesPerEntry) / kBucket + 1);
        g.extents_at = kUnit;
        g.table_at = round_up(g.extents_at + g.extents * sizeof(Extent), kUnit);
        g.marks_at = g.table_at + g.buckets * kBucket * sizeof(Word);
        g.data_at = round_up(g.marks_at + g.extents * g.units(), kHuge);
        g.file_bytes = round_up(g.data_at + g.extents * g.extent_bytes, kHuge);
        return g;
    }
};

}  // namespace hicache::memory
