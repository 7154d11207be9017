// cuFile as this project needs it: its ABI declared here, its functions found in a libcufile.so.0 at run time.
//
// The declarations restate the documented ABI of the functions named in `Api`, so that building needs no headers of
// cuFile's. The library itself is loaded for a device that is open already and never without: where there is no
// libcuda, opening its driver spins for ever. Does not belong here: what is moved, or where to.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <ctime>
#include <memory>
#include <string>

#include "cuda/device.hpp"

namespace hicache::gds {

using Handle = struct HandleTag*;
using BatchHandle = struct BatchHandleTag*;

struct Error {  // CUfileError_t
    int code;
    int cuda;
};
static_assert(sizeof(Error) == 8);

struct Descriptor {  // CUfileDescr_t
    int type;
    union {
        int fd;
        void* handle;
    };
    const void* operations;
};
static_assert(sizeof(Descriptor) == 24 && offsetof(Descriptor, fd) == 8);

struct Properties {  // CUfileDrvProps_t
    unsigned driver_major, driver_minor;
    std::size_t poll_threshold, max_direct_io_kib;
    unsigned file_systems, control;
    unsigned features, max_device_cache_kib, per_buffer_cache_kib, max_pinned_kib, max_batch, max_batch_timeout_ms;
    char room[64];  // for members of versions to come
};
static_assert(offsetof(Properties, features) == 32 && offsetof(Properties, room) == 56);

struct BatchIo {  // CUfileIOParams_t
    int mode;
    void* base;
    off_t file_offset;
    off_t base_offset;
    std::size_t size;
    Handle file;
    int operation;
    void* cookie;
};
static_assert(sizeof(BatchIo) == 64 && offsetof(BatchIo, file) == 40);

struct BatchEvent {  // CUfileIOEvents_t
    void* cookie;
    int status;
    std::size_t moved;  // a negative error, or how much was moved
};
static_assert(sizeof(BatchEvent) == 24);

inline constexpr int kOpaqueFd = 1;
inline constexpr int kBatchMode = 1;
inline constexpr int kBatchRead = 0, kBatchWrite = 1;
inline constexpr int kWaiting = 1, kPending = 2, kComplete = 16;
inline constexpr int kParameterAllowCompatibility = 1;
inline constexpr int kFirstCode = 5000;
inline constexpr int kCudaDriverError = 5011;
inline constexpr int kAlreadyOpen = 5026;
inline constexpr unsigned kFeaturePeerToPeer = 1u << 4;

struct Api {
    Error (*driver_open)();
    Error (*driver_properties)(Properties*);
    Error (*handle_register)(Handle*, Descriptor*);
    void (*handle_deregister)(Handle);
    Error (*buffer_register)(const void*, std::size_t, int);
    Error (*buffer_deregister)(const void*);
    ssize_t (*read)(Handle, void*, std::size_t, off_t, off_t);
    ssize_t (*write)(Handle, const void*, std::size_t, off_t, off_t);
    // Null where the library is older than these.
    Error (*version)(int*);
    Error (*set_bool)(int, bool);
    Error (*batch_setup)(BatchHandle*, unsigned);
    Error (*batch_submit)(BatchHandle, unsigned, BatchIo*, unsigned);
    Error (*batch_status)(BatchHandle, unsigned, unsigned*, BatchEvent*, timespec*);
    Error (*batch_cancel)(BatchHandle);
    void (*batch_destroy)(BatchHandle);
    Error (*read_async)(Handle, void*, std::size_t*, off_t*, off_t*, ssize_t*, cuda::Stream);
    Error (*write_async)(Handle, void*, std::size_t*, off_t*, off_t*, ssize_t*, cuda::Stream);
};

/// "cuFile error 5011 (CUDA_ERROR_...)".
std::string words_of(const Error& error);

/// A libcufile that is loaded, its driver open: for as long as the process lives, since others may use it too.
class Library {
  public:
    /// strict: refuse what only compatibility mode can do; for a process that asks nothing else of cuFile.
    /// cuda::Unavailable: it cannot be loaded, is too old, or its driver does not open.
    Library(std::shared_ptr<cuda::Device> device, const std::string& path, bool strict);
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    const std::shared_ptr<cuda::Device> device;
    Api api{};
    int version = 0;  // 1000 * major + 10 * minor; 0: it does not say
    Properties properties{};
};

/// An open file that cuFile knows, through a descriptor of its own: cuFile goes by the number, and the file's may be
/// closed and given to another file at any time.
class File {
  public:
    /// cuda::Unavailable: the file cannot be used in this way.
    File(std::shared_ptr<Library> library, int fd);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    Handle handle = nullptr;

  private:
    std::shared_ptr<Library> library_;
    int fd_ = -1;
};

/// Device memory that cuFile knows, until this goes.
class Buffer {
  public:
    /// cuda::Unavailable: it stays unregistered, which costs a copy in the device.
    Buffer(std::shared_ptr<Library> library, cuda::Address address, std::size_t length);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    const cuda::Address address;
    const std::size_t length;

  private:
    std::shared_ptr<Library> library_;
};

}  // namespace hicache::gds
