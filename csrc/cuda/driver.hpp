// The CUDA driver as this project needs it: its ABI declared here, its functions found in libcuda.so.1 at run time.
//
// The driver and not the run-time library, and no link to either: one build loads with every torch, on every driver,
// and on machines that have none. The declarations restate the documented, versioned ABI of the functions named in
// `Api` (each by the symbol of the version meant), so that building needs no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace hicache::cuda {

using Result = int;
using DeviceNumber = int;
using Address = std::uint64_t;  // CUdeviceptr; with unified addressing host memory has them too
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotReady = 600;

inline constexpr unsigned kEventWithoutTiming = 2;
inline constexpr unsigned kEventSleeping = 1;  // who waits for it sleeps
inline constexpr unsigned kStreamNonBlocking = 1;
// A kernel's blocks come before those of other streams as soon as a multiprocessor has room. Copies have no priority.
inline constexpr int kBeforeOthers = -1;
inline constexpr int kMemoryHost = 1;
inline constexpr int kMemoryDevice = 2;
inline constexpr int kMemoryUnified = 4;
inline constexpr int kPointerMemoryType = 2;
inline constexpr int kPointerDevicePointer = 3;
inline constexpr int kPointerRangeStart = 11;
inline constexpr int kPointerRangeSize = 12;
inline constexpr int kAttributeMultiprocessors = 16;
inline constexpr int kAttributeMaxPitch = 11;
inline constexpr int kAttributeMajor = 75;
inline constexpr int kAttributeMinor = 76;
inline constexpr int kCaptureNone = 0;
inline constexpr int kCaptureModeRelaxed = 2;

struct Copy2d {  // CUDA_MEMCPY2D_v2
    std::size_t src_x, src_y;
    int src_type;
    const void* src_host;
    Address src_device;
    void* src_array;
    std::size_t src_pitch;
    std::size_t dst_x, dst_y;
    int dst_type;
    void* dst_host;
    Address dst_device;
    void* dst_array;
    std::size_t dst_pitch;
    std::size_t width, height;
};
static_assert(sizeof(Copy2d) == 128);

struct BatchAttributes {  // CUmemcpyAttributes_v1
    int source_order = 1;  // in stream order
    int source_hint[2] = {0, 0};
    int target_hint[2] = {0, 0};
    unsigned flags = 1;  // prefer to overlap with compute
};
static_assert(sizeof(BatchAttributes) == 24);

struct Api {
    Result (*init)(unsigned);
    Result (*driver_version)(int*);
    Result (*device_count)(int*);
    Result (*device_get)(DeviceNumber*, int);
    Result (*device_name)(char*, int, DeviceNumber);
    Result (*device_attribute)(int*, int, DeviceNumber);
    Result (*context_retain)(Context*, DeviceNumber);
    Result (*context_release)(DeviceNumber);
    Result (*context_push)(Context);
    Result (*context_pop)(Context*);
    Result (*context_device)(DeviceNumber*);
    Result (*error_name)(Result, const char**);
    Result (*module_load)(Module*, const void*);
    Result (*module_unload)(Module);
    Result (*module_function)(Function*, Module, const char*);
    Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                     void**);
    Result (*allocate)(Address*, std::size_t);
    Result (*free)(Address);
    Result (*allocate_host)(void**, std::size_t);
    Result (*free_host)(void*);
    Result (*copy_async)(Address, Address, std::size_t, Stream);
    Result (*copy_2d_async)(const Copy2d*, Stream);
    Result (*pointer_attribute)(void*, int, Address);
    Result (*stream_create)(Stream*, unsigned);
    Result (*stream_create_with_priority)(Stream*, unsigned, int);
    Result (*stream_destroy)(Stream);
    Result (*stream_wait)(Stream, Event, unsigned);
    Result (*stream_synchronize)(Stream);
    Result (*stream_capturing)(Stream, int*);
    Result (*exchange_capture_mode)(int*);
    Result (*event_create)(Event*, unsigned);
    Result (*event_destroy)(Event);
    Result (*event_record)(Event, Stream);
    Result (*event_query)(Event);
    Result (*event_synchronize)(Event);
    /// Driver 12.8 and newer, else null. Not for the default stream, not while a stream is captured.
    Result (*copy_batch_async)(Address*, Address*, std::size_t*, std::size_t, BatchAttributes*, std::size_t*,
                               std::size_t, std::size_t*, Stream);
};

/// What was asked for cannot be had here or now, and nothing has been started: another way may do.
struct Unavailable : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// A call of the driver failed; what was started before it may be under way.
struct Failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Loads the driver and initialises it, once. Unavailable: no libcuda.so.1, or no device behind it.
const Api& api();

/// "CUDA_ERROR_..." of a result.
std::string name_of(Result result);

/// Failed unless the result is a success; `what` is the call in words.
inline void check(Result result, const char* what) {
    if (result != kSuccess) throw Failed(std::string(what) + ": " + name_of(result));
}

}  // namespace hicache::cuda
