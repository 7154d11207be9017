/* A CUDA driver without a GPU, for faults and for the calls that would be made: what csrc/cuda needs of libcuda.so.1.

   Copies are made at once, by the CPU. Memory is "on the device" where it was declared so, and pinned where it was
   registered, or allocated here. Kernels are this file's own, where they are asked for (stand_in_kernels): they compute
   what ours do. It shows that calls fit together and what is said when one fails; nothing of streams, overlap or speed,
   and nothing of our kernels.

   Children that load it hear of faults by the environment, STAND_IN_CUDA: "none" (no device), "kernels".

   Build: cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 stand_in_driver.c; load it before anybody else does. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    OK = 0,
    INVALID = 1,
    OUT_OF_MEMORY = 2,
    NO_CONTEXT = 201,
    NO_BINARY = 209,
    REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801
};

struct range {
    uint64_t start, size;
    int kind; /* 1: pinned host memory, 2: device memory */
};

static struct range ranges[4096];
static int count;

/* What goes wrong: set from outside. */
int stand_in_devices = 1, stand_in_refuses_pinning, stand_in_capturing, stand_in_memory = 1 << 30, stand_in_fails_copies;
int stand_in_keeps_pinned, stand_in_kernels, stand_in_stream_error;
/* What was done. */
long stand_in_copies;

static int add(uint64_t start, uint64_t size, int kind) {
    if (count == 4096) return OUT_OF_MEMORY;
    ranges[count++] = (struct range){start, size, kind};
    return OK;
}

int stand_in_device_memory(uint64_t start, uint64_t size) { return add(start, size, 2); }

__attribute__((constructor)) static void ask_environment(void) {
    const char* said = getenv("STAND_IN_CUDA");
    if (said != NULL && strstr(said, "none")) stand_in_devices = 0;
    if (said != NULL && strstr(said, "kernels")) stand_in_kernels = 1;
}

int cuInit(unsigned flags) { return stand_in_devices ? OK : 100; }
int cuDriverGetVersion(int* version) { return *version = 12080, OK; }
int cuDeviceGetCount(int* devices) { return *devices = stand_in_devices, OK; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < stand_in_devices ? OK : 101; }
int cuDeviceGetName(char* name, int length, int device) { return strncpy(name, "stand-in", (size_t)length), OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = attribute == 11 ? 1 << 30 : 9, OK; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
/* Once a thread has entered, as torch's do, only threads that have a context may unpin. */
static int contexts;
static __thread int current;
int stand_in_enter(void) { return ++contexts, ++current, OK; }
int cuCtxGetCurrent(void** context) { return *context = current ? (void*)1 : 0, OK; }
int cuCtxPushCurrent_v2(void* context) { return context ? (++current, OK) : NO_CONTEXT; }
int cuCtxPopCurrent_v2(void** context) { return --current, *context = (void*)1, OK; }
int cuCtxGetDevice(int* device) { return *device = 0, current ? OK : NO_CONTEXT; }
int cuGetErrorName(int error, const char** name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR";
    return OK;
}
int cuModuleLoadData(void** module, const void* image) { return stand_in_kernels ? OK : NO_BINARY; }
int cuModuleUnload(void* module) { return OK; }
enum { CHECKSUMS = 100 };
int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (strcmp(name, "crc32c_chunks") == 0) return *function = (void*)CHECKSUMS, OK;
    if (strncmp(name, "copy_", 5) == 0) return *function = (void*)(size_t)atoi(name + 5), OK;
    return INVALID;
}

/* As in csrc/cuda/shape.hpp. */
struct divider {
    uint32_t divisor, multiplier, shift;
};
struct copy_arguments {
    const uint64_t *from_planes, *to_planes;
    int64_t from_token, to_token, from_head, to_head;
    struct divider chunks, heads, second, third;
    uint32_t vectors, total, lanes_log2, planes_inside;
    uint64_t from_pages[240], to_pages[240];
};
struct checksum_arguments {
    const uint64_t* addresses;
    const uint32_t* lengths;
    uint32_t* out;
    uint32_t chunks;
};

static void copy_kernel(const struct copy_arguments* a, uint32_t vector) {
    for (uint32_t chunk = 0; chunk < a->total; ++chunk) {
        uint32_t run = chunk / a->chunks.divisor, first = (chunk % a->chunks.divisor) << a->lanes_log2;
        uint32_t row = run / a->heads.divisor, head = run % a->heads.divisor;
        uint32_t rest = row / a->second.divisor, second = row % a->second.divisor;
        uint32_t page = rest / a->third.divisor, third = rest % a->third.divisor;
        uint32_t plane = a->planes_inside ? second : third, last = first + (1u << a->lanes_log2);
        int64_t token = a->planes_inside ? third : second;
        uint64_t from = a->from_planes[plane] + a->from_pages[page] + token * a->from_token + head * a->from_head;
        uint64_t to = a->to_planes[plane] + a->to_pages[page] + token * a->to_token + head * a->to_head;
        if (last > a->vectors) last = a->vectors;
        memcpy((char*)to + first * vector, (const char*)from + first * vector, (last - first) * vector);
    }
}

static uint32_t crc32c(const unsigned char* data, uint32_t length) {
    static uint32_t table[256];
    uint32_t crc = 0xFFFFFFFFu;
    if (table[1] == 0)
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0x82F63B78u : 0);
            table[i] = value;
        }
    for (uint32_t i = 0; i < length; ++i) crc = (crc >> 8) ^ table[(crc ^ data[i]) & 0xFF];
    return ~crc;
}

int cuLaunchKernel(void* f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned h, void* s,
                   void** p, void** x) {
    if (!stand_in_kernels) return NOT_SUPPORTED;
    if (stand_in_stream_error) return 700;
    if ((size_t)f != CHECKSUMS) return copy_kernel(p[0], (uint32_t)(size_t)f), OK;
    const struct checksum_arguments* sums = p[0];
    for (uint32_t i = 0; i < sums->chunks; ++i)
        sums->out[i] = crc32c((const unsigned char*)sums->addresses[i], sums->lengths[i]);
    return OK;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    void* made = NULL;
    if (bytes > (size_t)stand_in_memory || posix_memalign(&made, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
    return add(*address = (uint64_t)made, bytes, 2);
}
int cuMemFree_v2(uint64_t address) {
    for (int i = 0; i < count; ++i)
        if (ranges[i].start == address && ranges[i].kind == 2) {
            ranges[i] = ranges[--count];
            break;
        }
    return free((void*)address), OK;
}
int cuMemAllocHost_v2(void** address, size_t bytes) {
    if (bytes > (size_t)stand_in_memory || posix_memalign(address, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
    return OK;
}
int cuMemFreeHost(void* address) { return free(address), OK; }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    if (stand_in_fails_copies) return 700;
    ++stand_in_copies;
    return memcpy((void*)to, (void*)from, bytes), OK;
}
struct copy_2d {
    size_t from_x, from_y;
    int from_type;
    void* from_host;
    uint64_t from;
    void* from_array;
    size_t from_pitch, to_x, to_y;
    int to_type;
    void* to_host;
    uint64_t to;
    void* to_array;
    size_t to_pitch, width, height;
};
int cuMemcpy2DAsync_v2(const struct copy_2d* c, void* stream) {
    if (stand_in_fails_copies) return 700;
    ++stand_in_copies;
    for (size_t row = 0; row < c->height; ++row)
        memcpy((void*)(c->to + row * c->to_pitch), (void*)(c->from + row * c->from_pitch), c->width);
    return OK;
}
int cuMemHostRegister_v2(void* address, size_t bytes, unsigned flags) {
    if (stand_in_refuses_pinning) return OUT_OF_MEMORY;
    for (int i = 0; i < count; ++i)
        if (ranges[i].kind == 1 && (uint64_t)address < ranges[i].start + ranges[i].size &&
            ranges[i].start < (uint64_t)address + bytes)
            return REGISTERED;
    return add((uint64_t)address, bytes, 1);
}
int cuMemHostUnregister(void* address) {
    if (contexts && !current) return NO_CONTEXT;
    if (stand_in_keeps_pinned) return INVALID;
    for (int i = 0; i < count; ++i) {
        if (ranges[i].start != (uint64_t)address || ranges[i].kind != 1) continue;
        /* The pages must be there still: whoever unmaps first leaves the driver with addresses of nobody's. */
        unsigned char there;
        if (mincore(address, 1, &there)) abort();
        return ranges[i] = ranges[--count], OK;
    }
    return NOT_REGISTERED;
}
int stand_in_pinned(void) {
    int pinned = 0;
    for (int i = 0; i < count; ++i) pinned += ranges[i].kind == 1;
    return pinned;
}
int cuPointerGetAttribute(void* value, int attribute, uint64_t address) {
    for (int i = 0; i < count; ++i) {
        if (address < ranges[i].start || address >= ranges[i].start + ranges[i].size) continue;
        if (attribute == 2) return *(int*)value = ranges[i].kind, OK;
        if (attribute == 3) return *(uint64_t*)value = address, OK;
        if (attribute == 11) return *(uint64_t*)value = ranges[i].start, OK;
        if (attribute == 12) return *(size_t*)value = ranges[i].size, OK;
    }
    return INVALID;
}
int cuStreamCreate(void** stream, unsigned flags) { return *stream = (void*)0x100, OK; }
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) { return *stream = (void*)0x100, OK; }
int cuStreamDestroy_v2(void* stream) { return OK; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return OK; }
int cuStreamSynchronize(void* stream) { return stand_in_stream_error ? 700 : OK; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = stand_in_capturing, OK; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return OK; }
int cuEventCreate(void** event, unsigned flags) { return *event = malloc(1), OK; }
int cuEventDestroy_v2(void* event) { return free(event), OK; }
int cuEventRecord(void* event, void* stream) { return OK; }
int cuEventQuery(void* event) { return OK; }
/* What else goes on in the process while somebody waits for the device. */
void (*stand_in_while_waiting)(void);
int cuEventSynchronize(void* event) {
    if (stand_in_while_waiting) stand_in_while_waiting();
    return stand_in_stream_error ? 700 : OK;
}
