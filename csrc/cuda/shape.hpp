// What the kernels are given, shared by host and device code: plain numbers only.
//
// Every block layout is reduced to the same addresses. A run is `run` contiguous bytes on both sides; the run of
// (page, plane, token, head) starts on side s at
//
//     planes_s[plane] + pages_s[page] + token * token_stride_s + head * head_stride_s        (modulo 2^64)
//
// with one plane per layer and K or V. Bytes have no type here.
#pragma once

#include <cstdint>

namespace hicache::cuda {

/// Division by a number that is known before the launch: exact for dividends below 2^31.
/// Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
struct Divider {
    std::uint32_t divisor = 1, multiplier = 0, shift = 0;

    static Divider of(std::uint32_t divisor) {
        Divider made;
        made.divisor = divisor;
        if (divisor == 1) return made;
        std::uint32_t log = 0;
        while ((std::uint64_t{1} << log) < divisor) ++log;
        made.multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + log)) + divisor - 1) / divisor);
        made.shift = log - 1;
        return made;
    }
};

/// Pages of one launch: they travel in the kernel's arguments (4 KiB on every driver), so that a launch owns all it
/// reads but the planes, and can be captured in a graph.
inline constexpr std::uint32_t kPagesPerLaunch = 240;

/// Threads of a block, and vectors that each of them has under way at a time: 128 KiB for each multiprocessor that takes
/// part. What limits a copy over PCIe is the bytes under way, and few full multiprocessors disturb others' kernels less
/// than many half full ones.
inline constexpr std::uint32_t kThreads = 1024;
inline constexpr int kInFlight = 8;

struct CopyArguments {
    const std::uint64_t* from_planes;  // device memory, from the first plane of this launch
    const std::uint64_t* to_planes;
    std::int64_t from_token, to_token, from_head, to_head;  // strides in bytes
    Divider chunks;        // pieces of a run: one vector for each lane of a group
    Divider heads;
    Divider second;        // tokens, or planes where planes_inside
    Divider third;         // the other one
    std::uint32_t vectors;  // of a run
    std::uint32_t total;    // chunks of the launch, below 2^31
    std::uint32_t lanes_log2;
    std::uint32_t planes_inside;  // neighbouring chunks differ in plane first, then in token
    std::uint64_t from_pages[kPagesPerLaunch];
    std::uint64_t to_pages[kPagesPerLaunch];
};
static_assert(sizeof(CopyArguments) <= 4096);

struct ChecksumArguments {
    const std::uint64_t* addresses;  // of each chunk
    const std::uint32_t* lengths;
    std::uint32_t* out;
    std::uint32_t chunks;
};
inline constexpr std::uint32_t kChecksumThreads = 256;

}  // namespace hicache::cuda
