// CRC32C of many chunks of device memory: one block for each chunk, the value that csrc/checksum gives.
//
// A CRC is linear over GF(2), so vectors of 16 bytes are dealt to the threads in turn, each thread folds its own by
// Horner's rule, and the partial remainders are moved to the end of the chunk and added up. Tables lie in shared
// memory; they are computed there from the polynomial (gf2.hpp).
#pragma once

#include "checksum/gf2.hpp"
#include "shape.hpp"

namespace hicache::cuda {

using checksum::gf2::kPolynomial;

// gf2.hpp's functions are constexpr for the host; these are the same for a device.
__device__ inline std::uint32_t gf_times(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = checksum::gf2::kOne; bit != 0; bit >>= 1) {
        if ((a & bit) != 0) product ^= b;
        b = (b >> 1) ^ ((b & 1u) != 0 ? kPolynomial : 0u);
    }
    return product;
}

__device__ inline std::uint32_t gf_power_of_x(std::uint64_t exponent) {
    std::uint32_t result = checksum::gf2::kOne, base = checksum::gf2::kOne >> 1;
    for (; exponent != 0; exponent >>= 1) {
        if ((exponent & 1u) != 0) result = gf_times(result, base);
        base = gf_times(base, base);
    }
    return result;
}

struct ChecksumTables {
    std::uint32_t slice[16][256];  // of a byte with so many bytes after it in its vector
    std::uint32_t stride[4][256];  // moves a remainder by one vector of every thread
    std::uint32_t partial[kChecksumThreads / 32];
};

__device__ inline void fill(ChecksumTables& tables, std::uint32_t thread) {
    std::uint32_t value = thread;  // one byte for each of the 256 threads
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1u) != 0 ? kPolynomial : 0u);
    tables.slice[0][thread] = value;
    const std::uint32_t by = gf_power_of_x(8ull * 16 * kChecksumThreads);
    for (int byte = 0; byte < 4; ++byte) tables.stride[byte][thread] = gf_times(thread << (8 * byte), by);
    __syncthreads();
    for (int slice = 1; slice < 16; ++slice) {
        value = (value >> 8) ^ tables.slice[0][value & 0xFFu];
        tables.slice[slice][thread] = value;
    }
    __syncthreads();
}

__device__ inline std::uint32_t remainder_of(const ChecksumTables& tables, const uint4& vector) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    std::uint32_t value = 0;
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int byte = 0; byte < 4; ++byte)
            value ^= tables.slice[15 - 4 * word - byte][(words[word] >> (8 * byte)) & 0xFFu];
    return value;
}

__device__ inline uint4 load_vector(const unsigned char* at, bool aligned) {
    if (aligned) return __ldcs(reinterpret_cast<const uint4*>(at));
    std::uint32_t words[4];
#pragma unroll
    for (int word = 0; word < 4; ++word)
        words[word] = at[4 * word] | std::uint32_t{at[4 * word + 1]} << 8 | std::uint32_t{at[4 * word + 2]} << 16 |
                      std::uint32_t{at[4 * word + 3]} << 24;
    return uint4{words[0], words[1], words[2], words[3]};
}

}  // namespace hicache::cuda

extern "C" __global__ void __launch_bounds__(hicache::cuda::kChecksumThreads)
    crc32c_chunks(const __grid_constant__ hicache::cuda::ChecksumArguments a) {
    using namespace hicache::cuda;
    __shared__ ChecksumTables tables;
    const std::uint32_t thread = threadIdx.x;
    fill(tables, thread);
    const std::uint32_t to_the_end = gf_power_of_x(8ull * 16 * thread);
    // What the initial value has become at the end of so many vectors: as much work as a whole chunk of 64 KiB, and most
    // chunks are as long as the one before.
    std::uint32_t begun_for = 0, begun = 0xFFFFFFFFu;
    for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
        const auto* data = reinterpret_cast<const unsigned char*>(a.addresses[chunk]);
        const bool aligned = (a.addresses[chunk] & 15u) == 0;
        const std::uint32_t length = a.lengths[chunk], vectors = length / 16;
        // Vectors are numbered from the chunk's end, so that every thread's last one is its `thread`th from there.
        std::uint32_t value = 0;
        if (vectors > thread) {
            std::uint32_t back = thread + (vectors - 1 - thread) / kChecksumThreads * kChecksumThreads;
            for (;; back -= kChecksumThreads) {
                value = tables.stride[0][value & 0xFFu] ^ tables.stride[1][(value >> 8) & 0xFFu] ^
                        tables.stride[2][(value >> 16) & 0xFFu] ^ tables.stride[3][value >> 24];
                value ^= remainder_of(tables, load_vector(data + 16ull * (vectors - 1 - back), aligned));
                if (back == thread) break;
            }
            value = gf_times(value, to_the_end);
        }
        for (int offset = 16; offset != 0; offset >>= 1) value ^= __shfl_xor_sync(0xFFFFFFFFu, value, offset);
        if ((thread & 31u) == 0) tables.partial[thread / 32] = value;
        __syncthreads();
        if (thread == 0) {
            if (vectors != begun_for) begun = gf_times(0xFFFFFFFFu, gf_power_of_x(8ull * 16 * vectors));
            begun_for = vectors;
            std::uint32_t crc = begun;
            for (std::uint32_t warp = 0; warp < kChecksumThreads / 32; ++warp) crc ^= tables.partial[warp];
            for (std::uint32_t at = 16 * vectors; at < length; ++at)
                crc = (crc >> 8) ^ tables.slice[0][(crc ^ data[at]) & 0xFFu];
            a.out[chunk] = ~crc;
        }
        __syncthreads();
    }
}
