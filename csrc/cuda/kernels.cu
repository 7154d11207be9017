// The copy kernel: gathers and scatters runs between any two memories that the device can address.
#include "shape.hpp"

#include "checksum.cuh"

namespace hicache::cuda {
namespace {

__device__ __forceinline__ std::uint32_t divide(std::uint32_t n, const Divider& by) {
    return by.divisor == 1 ? n : __umulhi(n, by.multiplier) >> by.shift;
}

// Groups of 2^lanes_log2 neighbouring threads each move one chunk of a run at a time. All loads of a round are issued
// before its first store: over PCIe the bytes under way are what sets the speed.
template <typename Vector>
__device__ __forceinline__ void copy_runs(const CopyArguments& a) {
    const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const std::uint32_t group = thread >> a.lanes_log2;
    const std::uint32_t groups = (gridDim.x * blockDim.x) >> a.lanes_log2;
    const std::uint32_t lane = threadIdx.x & ((1u << a.lanes_log2) - 1);
    for (std::uint32_t first = group; first < a.total; first += groups * kInFlight) {
        Vector held[kInFlight];
        Vector* to[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const std::uint32_t chunk = first + i * groups;
            to[i] = nullptr;
            if (chunk >= a.total) continue;
            const std::uint32_t run = divide(chunk, a.chunks);
            const std::uint32_t vector = ((chunk - run * a.chunks.divisor) << a.lanes_log2) + lane;
            if (vector >= a.vectors) continue;
            const std::uint32_t row = divide(run, a.heads);
            const std::uint32_t head = run - row * a.heads.divisor;
            const std::uint32_t rest = divide(row, a.second);
            const std::uint32_t second = row - rest * a.second.divisor;
            const std::uint32_t page = divide(rest, a.third);
            const std::uint32_t third = rest - page * a.third.divisor;
            const std::uint32_t plane = a.planes_inside ? second : third;
            const std::int64_t token = a.planes_inside ? third : second;
            const std::uint64_t from = __ldg(a.from_planes + plane) + a.from_pages[page] + token * a.from_token +
                                       static_cast<std::int64_t>(head) * a.from_head;
            const std::uint64_t into = __ldg(a.to_planes + plane) + a.to_pages[page] + token * a.to_token +
                                       static_cast<std::int64_t>(head) * a.to_head;
            held[i] = __ldcs(reinterpret_cast<const Vector*>(from) + vector);
            to[i] = reinterpret_cast<Vector*>(into) + vector;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
            if (to[i] != nullptr) __stcs(to[i], held[i]);
    }
}

}  // namespace
}  // namespace hicache::cuda

#define HICACHE_COPY_KERNEL(bytes, vector)                                               \
    extern "C" __global__ void __launch_bounds__(hicache::cuda::kThreads)                \
        copy_##bytes(const __grid_constant__ hicache::cuda::CopyArguments arguments) {   \
        hicache::cuda::copy_runs<vector>(arguments);                                     \
    }

HICACHE_COPY_KERNEL(16, uint4)
HICACHE_COPY_KERNEL(8, uint2)
HICACHE_COPY_KERNEL(4, unsigned int)
HICACHE_COPY_KERNEL(2, unsigned short)
HICACHE_COPY_KERNEL(1, unsigned char)
