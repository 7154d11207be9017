// Arithmetic in GF(2)[x] modulo the CRC32C polynomial, for tables and folding constants that are
// computed at compile time instead of pasted: a wrong digit in a pasted constant is a wrong checksum.
//
// Polynomials are bit-reflected as CRC32C is: bit 31 is x^0, bit 0 is x^31.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hicache::checksum::gf2 {

inline constexpr std::uint32_t kPolynomial = 0x82F63B78u;  // 0x1EDC6F41 reflected
inline constexpr std::uint32_t kOne = 0x80000000u;

constexpr std::uint32_t times_x(std::uint32_t a) noexcept {
    return (a >> 1) ^ ((a & 1u) != 0 ? kPolynomial : 0u);
}

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) noexcept {
    std::uint32_t product = 0;
    for (std::uint32_t bit = kOne; bit != 0; bit >>= 1) {
        if ((a & bit) != 0) product ^= b;
        b = times_x(b);
    }
    return product;
}

/// x^exponent modulo the polynomial.
constexpr std::uint32_t power_of_x(std::uint64_t exponent) noexcept {
    std::uint32_t result = kOne;
    std::uint32_t base = kOne >> 1;  // x
    for (; exponent != 0; exponent >>= 1) {
        if ((exponent & 1u) != 0) result = multiply(result, base);
        base = multiply(base, base);
    }
    return result;
}

/// The multiplier that moves a CRC forward over `bytes` zero bytes.
constexpr std::uint32_t shift_bytes(std::uint64_t bytes) noexcept { return power_of_x(8 * bytes); }

}  // namespace hicache::checksum::gf2
