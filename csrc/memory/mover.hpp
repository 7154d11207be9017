// Who copies pages for a region that the CPU does not: a device.
//
// The region knows addresses and checksums, and the other side is in another library (csrc/cuda): so this is plain C, and
// travels between the two as a capsule of Python's.
//
// Belongs here: that one call. Does not belong here: which pages (past.cpp), or how a device copies (csrc/cuda).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hicache::memory {

/// Of the capsule that holds a `Mover`: what another build calls by the same name must be the same.
constexpr char kMoverName[] = "hicache_ext.mover.2";

/// Bytes that lie together on both sides.
struct Piece {
    std::uint64_t to, from, bytes;
};

/// Memory whose CRC32C is wanted, chunk by chunk: where the pages lie that are not the region's. source: that is where
/// they are copied from, so their checksums need not wait for the copies.
struct Chunks {
    const std::uint64_t* addresses;
    const std::uint32_t* lengths;
    std::uint32_t* crcs;  // written
    std::size_t count;
    bool source;
};

struct Mover {
    void* self;

    /// Copies all pieces and gives the chunks' checksums, unless they are the source as they are when the copies are done;
    /// 0, or not 0 and a reason in `why`. Either way nothing touches any of this memory once it has returned, and what was written is there for
    /// every reader.
    int (*move)(void* self, const Piece* pieces, std::size_t count, const Chunks* chunks, char* why, std::size_t room);
};

}  // namespace hicache::memory
