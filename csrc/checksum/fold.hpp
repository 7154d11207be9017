// CRC32C by folding with AVX-512 and VPCLMULQDQ: what the checksum alone, and the one that copies as well, have in common.
//
// Belongs here: the arithmetic, inlined into whoever loads the bytes. Does not belong here: loops, or whether this CPU can.
// Source of the method: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel).
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "checksum/gf2.hpp"

#define HICACHE_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,vpclmulqdq,pclmul,sse4.2")))

namespace hicache::checksum {

// A carry-less product of two reflected 32-bit values carries one factor x, and the crc32
// instruction multiplies its 64-bit operand by x^32: so the multiplier is short by x^33.
constexpr std::uint32_t clmul_shift(std::uint64_t bits) { return gf2::power_of_x(bits - 33); }

// Multipliers that move a 128-bit lane forward by `Bits`: the low half (the higher powers of x)
// first. Short by x^33 for the reason given at clmul_shift.
template <std::uint64_t Bits>
HICACHE_AVX512 inline __m128i fold_constants() noexcept {
    constexpr std::uint32_t low = gf2::power_of_x(Bits + 64 - 33);
    constexpr std::uint32_t high = gf2::power_of_x(Bits - 33);
    return _mm_set_epi64x(high, low);
}

HICACHE_AVX512 inline __m512i fold(__m512i value, __m512i constants, __m512i next) noexcept {
    const __m512i low = _mm512_clmulepi64_epi128(value, constants, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(value, constants, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // three-way xor
}

HICACHE_AVX512 inline __m128i fold(__m128i value, __m128i constants, __m128i next) noexcept {
    const __m128i low = _mm_clmulepi64_si128(value, constants, 0x00);
    const __m128i high = _mm_clmulepi64_si128(value, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/// Bytes that one step folds.
constexpr std::size_t kFolded = 256;

// Pages come cold from a device, and the hardware's own prefetching ends at each 4 KiB of physical memory: looking
// this far ahead took a fifth off the CPU time of cold memory where it was measured. It may point past the end of
// the data, which is allowed: a prefetch never faults.
constexpr std::size_t kAhead = 4096;

HICACHE_AVX512 inline void fetch_ahead(const std::uint8_t* data) noexcept {
    for (std::size_t line = 0; line < kFolded; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(data) + kAhead + line, _MM_HINT_T0);
}

/// Four accumulators of 64 bytes.
class Folding {
  public:
    /// The first step, over four vectors; crc: the state before them (inverted, as states are).
    HICACHE_AVX512 Folding(__m512i a, __m512i b, __m512i c, __m512i d, std::uint32_t crc) noexcept
        : by_four_(_mm512_broadcast_i32x4(fold_constants<2048>())),
          a_(_mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(crc))))),
          b_(b),
          c_(c),
          d_(d) {}

    HICACHE_AVX512 Folding(const std::uint8_t* data, std::uint32_t crc) noexcept
        : Folding(_mm512_loadu_si512(data), _mm512_loadu_si512(data + 64), _mm512_loadu_si512(data + 128),
                  _mm512_loadu_si512(data + 192), crc) {}

    HICACHE_AVX512 void next(__m512i a, __m512i b, __m512i c, __m512i d) noexcept {
        a_ = fold(a_, by_four_, a);
        b_ = fold(b_, by_four_, b);
        c_ = fold(c_, by_four_, c);
        d_ = fold(d_, by_four_, d);
    }

    /// The state after all steps.
    HICACHE_AVX512 std::uint32_t state() const noexcept {
        const __m512i by_one = _mm512_broadcast_i32x4(fold_constants<512>());
        const __m512i all = fold(fold(fold(a_, by_one, b_), by_one, c_), by_one, d_);
        const __m128i by_lane = fold_constants<128>();
        __m128i lane = _mm512_extracti32x4_epi32(all, 0);
        lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(all, 1));
        lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(all, 2));
        lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(all, 3));
        std::uint64_t crc = _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(lane)));
        crc = _mm_crc32_u64(crc, static_cast<std::uint64_t>(_mm_extract_epi64(lane, 1)));
        return static_cast<std::uint32_t>(crc);
    }

  private:
    __m512i by_four_, a_, b_, c_, d_;
};

}  // namespace hicache::checksum
#endif
