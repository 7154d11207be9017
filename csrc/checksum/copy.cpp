#include "checksum/copy.hpp"

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"
#include "checksum/fold.hpp"

// A reader of memory that others write may find it changed under its hands, and judges the copy: no race to report. So
// under ThreadSanitizer memory is read by one function that it does not look at, and nothing is folded.
#if defined(__SANITIZE_THREAD__)
#define HICACHE_MAY_RACE __attribute__((no_sanitize_thread, noinline))
#define HICACHE_FOLDS 0
#else
#define HICACHE_MAY_RACE
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HICACHE_FOLDS 1
#else
#define HICACHE_FOLDS 0
#endif
#endif

namespace hicache::checksum {
namespace {

// Copied and checksummed in pieces that the first-level cache holds, so that memory is passed once.
constexpr std::size_t kPiece = 16384;

HICACHE_MAY_RACE void move(std::uint8_t* to, const std::uint8_t* from, std::size_t length) noexcept {
#if defined(__SANITIZE_THREAD__)
    for (std::size_t i = 0; i < length; ++i) const_cast<volatile std::uint8_t*>(to)[i] = from[i];
#else
    std::memcpy(to, from, length);
#endif
}

std::uint32_t in_pieces(std::uint8_t* to, const std::uint8_t* from, std::size_t length, std::uint32_t sum) noexcept {
    const auto crc = active().function;
    for (std::size_t at = 0; at < length; at += kPiece) {
        const std::size_t take = std::min(kPiece, length - at);
        move(to + at, from + at, take);
        sum = crc(to + at, take, sum);
    }
    return sum;
}

#if HICACHE_FOLDS

/// Below this the final reduction costs more than the folding saves.
constexpr std::size_t kLeastFolded = 1024;

template <bool Stream>
HICACHE_AVX512 inline void put(std::uint8_t* to, __m512i value) noexcept {
    if constexpr (Stream)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
    else
        _mm512_storeu_si512(to, value);
}

/// length: a multiple of kFolded, not 0.
template <bool Stream>
HICACHE_AVX512 std::uint32_t folded(std::uint8_t* to, const std::uint8_t* from, std::size_t length) noexcept {
    const auto step = [&]() HICACHE_AVX512 {
        struct Four {
            __m512i a, b, c, d;
        };
        const Four four{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), _mm512_loadu_si512(from + 128),
                        _mm512_loadu_si512(from + 192)};
        put<Stream>(to, four.a);
        put<Stream>(to + 64, four.b);
        put<Stream>(to + 128, four.c);
        put<Stream>(to + 192, four.d);
        from += kFolded;
        to += kFolded;
        return four;
    };
    auto four = step();
    Folding folding(four.a, four.b, four.c, four.d, ~0u);
    for (length -= kFolded; length != 0; length -= kFolded) {
        fetch_ahead(from);
        four = step();
        folding.next(four.a, four.b, four.c, four.d);
    }
    if constexpr (Stream) _mm_sfence();
    return ~folding.state();
}

bool folds() noexcept {
    static const bool does = std::strcmp(active().name, "avx512-vpclmulqdq") == 0;
    return does;
}

#endif

}  // namespace

std::uint32_t copy(std::uint8_t* to, const std::uint8_t* from, std::size_t length, bool stream) noexcept {
#if HICACHE_FOLDS
    if (length >= kLeastFolded && folds()) {
        const std::size_t whole = length / kFolded * kFolded;
        const bool aligned = reinterpret_cast<std::uintptr_t>(to) % 64 == 0;
        const std::uint32_t sum = stream && aligned ? folded<true>(to, from, whole) : folded<false>(to, from, whole);
        return whole == length ? sum : in_pieces(to + whole, from + whole, length - whole, sum);
    }
#endif
    return in_pieces(to, from, length, 0);
}

}  // namespace hicache::checksum
