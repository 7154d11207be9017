#include "fatbin.hpp"

#if defined(HICACHE_CUDA_FATBIN)
asm(".section .rodata, \"a\", @progbits\n"
    ".balign 16\n"
    "hicache_cuda_fatbin:\n"
    ".incbin \"" HICACHE_CUDA_FATBIN "\"\n"
    ".byte 0\n"
    ".previous\n");
extern "C" const unsigned char hicache_cuda_fatbin[] __attribute__((visibility("hidden")));
#endif

namespace hicache::cuda {

const void* fatbin() {
#if defined(HICACHE_CUDA_FATBIN)
    return hicache_cuda_fatbin;
#else
    return nullptr;
#endif
}

}  // namespace hicache::cuda
