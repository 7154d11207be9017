// Implementations of CRC32C and the choice between them.
//
//   avx512-vpclmulqdq  four 64-byte accumulators folded by carry-less multiplication
//   sse4.2             the crc32 instruction on three interleaved streams (latency 3, throughput 1)
//   armv8-crc          the same three streams with the ARMv8 CRC32 instructions
//   portable           slicing by 8
//
// Sources of the methods: Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32
// Instruction" and "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel).
#include "crc32c.hpp"

#include <array>
#include <cstring>
#include <vector>

#include "fold.hpp"
#include "gf2.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HICACHE_CRC_X86 1
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define HICACHE_CRC_ARM 1
#include <arm_acle.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace hicache::checksum {
namespace {

using gf2::kPolynomial;
using gf2::multiply;
using gf2::shift_bytes;

inline std::uint64_t load64(const std::uint8_t* at) noexcept {
    std::uint64_t value;
    std::memcpy(&value, at, sizeof value);  // callers give any address: no aligned loads
    return value;
}

// ---------------------------------------------------------------- portable

constexpr auto make_tables() {
    std::array<std::array<std::uint32_t, 256>, 8> tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = gf2::times_x(crc);
        tables[0][byte] = crc;
    }
    for (std::size_t slice = 1; slice < 8; ++slice)
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const std::uint32_t previous = tables[slice - 1][byte];
            tables[slice][byte] = (previous >> 8) ^ tables[0][previous & 0xFFu];
        }
    return tables;
}

constexpr auto kTables = make_tables();

std::uint32_t portable(const std::uint8_t* data, std::size_t length, std::uint32_t seed) noexcept {
    std::uint32_t crc = ~seed;
    for (; length >= 8; data += 8, length -= 8) {
        // Assembled from bytes so that a big-endian machine computes the same value.
        const std::uint32_t low = crc ^ (std::uint32_t{data[0]} | std::uint32_t{data[1]} << 8 |
                                         std::uint32_t{data[2]} << 16 | std::uint32_t{data[3]} << 24);
        crc = kTables[7][low & 0xFFu] ^ kTables[6][(low >> 8) & 0xFFu] ^ kTables[5][(low >> 16) & 0xFFu] ^
              kTables[4][low >> 24] ^ kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^
              kTables[0][data[7]];
    }
    for (; length != 0; ++data, --length) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFFu];
    return ~crc;
}

// Lane lengths for the interleaved versions: three lanes of the first fill a 64 KiB chunk, of the
// second a 4 KiB header; the third keeps short tails from running at the latency of one stream.
constexpr std::size_t kLanes[] = {21840, 1360, 80};
static_assert(kLanes[0] % 8 == 0 && kLanes[1] % 8 == 0 && kLanes[2] % 8 == 0);

#if defined(HICACHE_CRC_X86)

// ---------------------------------------------------------------- x86: SSE4.2 + PCLMULQDQ

__attribute__((target("sse4.2,pclmul"))) inline std::uint64_t shift_by(std::uint64_t crc,
                                                                      std::uint32_t multiplier) noexcept {
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(crc)),
                                                 _mm_cvtsi64_si128(multiplier), 0x00);
    return _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product)));
}

template <std::size_t Lane>
__attribute__((target("sse4.2,pclmul"))) inline std::uint64_t three_lanes(const std::uint8_t*& data,
                                                                         std::size_t& length,
                                                                         std::uint64_t crc) noexcept {
    constexpr std::uint32_t two_lanes_on = clmul_shift(16 * Lane);
    constexpr std::uint32_t one_lane_on = clmul_shift(8 * Lane);
    while (length >= 3 * Lane) {
        std::uint64_t second = 0;
        std::uint64_t third = 0;
        for (std::size_t at = 0; at < Lane; at += 8) {
            crc = _mm_crc32_u64(crc, load64(data + at));
            second = _mm_crc32_u64(second, load64(data + Lane + at));
            third = _mm_crc32_u64(third, load64(data + 2 * Lane + at));
        }
        crc = shift_by(crc, two_lanes_on) ^ shift_by(second, one_lane_on) ^ third;
        data += 3 * Lane;
        length -= 3 * Lane;
    }
    return crc;
}

__attribute__((target("sse4.2,pclmul"))) inline std::uint64_t sse42_state(const std::uint8_t* data,
                                                                          std::size_t length,
                                                                          std::uint64_t crc) noexcept {
    crc = three_lanes<kLanes[0]>(data, length, crc);
    crc = three_lanes<kLanes[1]>(data, length, crc);
    crc = three_lanes<kLanes[2]>(data, length, crc);
    for (; length >= 8; data += 8, length -= 8) crc = _mm_crc32_u64(crc, load64(data));
    for (; length != 0; ++data, --length) crc = _mm_crc32_u8(static_cast<std::uint32_t>(crc), *data);
    return crc;
}

__attribute__((target("sse4.2,pclmul"))) std::uint32_t sse42(const std::uint8_t* data, std::size_t length,
                                                             std::uint32_t seed) noexcept {
    return ~static_cast<std::uint32_t>(sse42_state(data, length, static_cast<std::uint32_t>(~seed)));
}

// ---------------------------------------------------------------- x86: AVX-512 VPCLMULQDQ

HICACHE_AVX512 std::uint32_t avx512(const std::uint8_t* data, std::size_t length, std::uint32_t seed) noexcept {
    std::uint64_t crc = static_cast<std::uint32_t>(~seed);
    // Below this the final reduction costs more than the folding saves.
    if (length >= 1024) {
        Folding folding(data, static_cast<std::uint32_t>(crc));
        data += kFolded;
        length -= kFolded;
        for (; length >= kFolded; data += kFolded, length -= kFolded) {
            fetch_ahead(data);
            folding.next(_mm512_loadu_si512(data), _mm512_loadu_si512(data + 64), _mm512_loadu_si512(data + 128),
                         _mm512_loadu_si512(data + 192));
        }
        crc = folding.state();
    }
    return ~static_cast<std::uint32_t>(sse42_state(data, length, crc));
}

#elif defined(HICACHE_CRC_ARM)

// ---------------------------------------------------------------- ARMv8

#if defined(__clang__)
#define HICACHE_ARM_CRC __attribute__((target("crc")))
#else
#define HICACHE_ARM_CRC __attribute__((target("+crc")))
#endif

template <std::size_t Lane>
HICACHE_ARM_CRC inline std::uint32_t three_lanes(const std::uint8_t*& data, std::size_t& length,
                                                 std::uint32_t crc) noexcept {
    constexpr std::uint32_t two_lanes_on = shift_bytes(2 * Lane);
    constexpr std::uint32_t one_lane_on = shift_bytes(Lane);
    while (length >= 3 * Lane) {
        std::uint32_t second = 0;
        std::uint32_t third = 0;
        for (std::size_t at = 0; at < Lane; at += 8) {
            crc = __crc32cd(crc, load64(data + at));
            second = __crc32cd(second, load64(data + Lane + at));
            third = __crc32cd(third, load64(data + 2 * Lane + at));
        }
        // Shifting in software: twice per lane group, so only long lanes are worth it.
        crc = multiply(crc, two_lanes_on) ^ multiply(second, one_lane_on) ^ third;
        data += 3 * Lane;
        length -= 3 * Lane;
    }
    return crc;
}

HICACHE_ARM_CRC std::uint32_t armv8(const std::uint8_t* data, std::size_t length, std::uint32_t seed) noexcept {
    std::uint32_t crc = ~seed;
    crc = three_lanes<kLanes[0]>(data, length, crc);
    crc = three_lanes<kLanes[1]>(data, length, crc);
    for (; length >= 8; data += 8, length -= 8) crc = __crc32cd(crc, load64(data));
    for (; length != 0; ++data, --length) crc = __crc32cb(crc, *data);
    return ~crc;
}

bool cpu_has_crc() noexcept {
#if defined(__APPLE__)
    return true;  // every Apple arm64 has it
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
    return false;
#endif
}

#endif

std::vector<Implementation> detect() {
    std::vector<Implementation> found;
#if defined(HICACHE_CRC_X86)
    __builtin_cpu_init();
    const bool sse = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
    if (sse && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("vpclmulqdq"))
        found.push_back({"avx512-vpclmulqdq", avx512});
    if (sse) found.push_back({"sse4.2", sse42});
#elif defined(HICACHE_CRC_ARM)
    if (cpu_has_crc()) found.push_back({"armv8-crc", armv8});
#endif
    found.push_back({"portable", portable});
    return found;
}

const std::vector<Implementation> kFound = detect();

}  // namespace

std::span<const Implementation> implementations() noexcept { return kFound; }

const Implementation& active() noexcept { return kFound.front(); }

}  // namespace hicache::checksum
