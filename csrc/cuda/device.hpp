// One GPU: its primary context (the one that torch uses), our kernels in it, events, and what kind of memory an
// address is. Does not belong here: what is copied, or how.
#pragma once

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.hpp"

namespace hicache::cuda {

class Device : public std::enable_shared_from_this<Device> {
  public:
    /// Unavailable: no driver, no such device, its context cannot be had.
    explicit Device(int ordinal);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    /// The context is current while this lives, and nothing done meanwhile disturbs a capture on another stream.
    class Entered {
      public:
        explicit Entered(const Device& device);
        ~Entered();
        Entered(const Entered&) = delete;
        Entered& operator=(const Entered&) = delete;

      private:
        const Api& api_;
        int mode_ = kCaptureModeRelaxed;
    };

    const Api& api;
    const int ordinal;
    std::string name;
    int driver_version = 0, multiprocessors = 0, major = 0, minor = 0, max_pitch = 0;
    std::string no_kernels;  // why there are none; empty when there are

    /// Of the copy kernel for vectors of 1, 2, 4, 8 or 16 bytes.
    Function copy_kernel(std::uint32_t vector_bytes) const;
    Function checksum_kernel() const { return checksum_; }

    /// The context is current in this thread from now on, for calls of others that go by that.
    void make_current() const;

    /// "device", "pinned" (the device reaches it at the same address) or "pageable", for all of these bytes.
    /// Memory that changes kind within is what its worst part is.
    const char* memory_kind(Address address, std::size_t length) const;

    bool capturing(Stream stream) const;

    /// Between any two kinds of memory; returns when the bytes are there, for every stream. (The driver's own cuMemcpy
    /// returns from pageable memory as soon as the source may be reused, and no stream of ours waits for what is left.)
    void copy(Address to, Address from, std::size_t bytes, const char* what);

    /// False in a forked child, where no call of the driver may be made.
    bool ours() const;

    /// CRC32C of chunks of device memory, in the order of `stream`; returns when `out` holds them.
    void crc32c(const std::uint64_t* addresses, const std::uint32_t* lengths, std::size_t count, std::uint32_t* out,
                Stream stream, unsigned blocks);

  private:
    void load_kernels();
    const char* kind_at(Address address, Address& range_end) const;

    pid_t process_;
    Context context_ = nullptr;
    Module module_ = nullptr;
    Function copies_[5] = {};
    Function checksum_ = nullptr;
    std::mutex copy_mutex_;
    Stream copy_stream_ = nullptr;
    std::mutex scratch_mutex_;
    Address scratch_ = 0;
    std::size_t scratch_bytes_ = 0;
};

/// Ordinal of the device whose context is current in this thread; -1: none is. Unavailable: no driver.
int current_ordinal();

/// Device memory that frees itself. Unavailable when the device has too little.
class DeviceMemory {
  public:
    DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    Address address = 0;

  private:
    std::shared_ptr<Device> device_;
};

/// A stream of our own, which waits for no other.
class OwnStream {
  public:
    explicit OwnStream(std::shared_ptr<Device> device);
    ~OwnStream();
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;

    void synchronize() const;

    Stream handle = nullptr;

  private:
    std::shared_ptr<Device> device_;
};

/// Ends of layers: an event for each, recorded in order as their copies are issued.
class Events {
  public:
    Events(std::shared_ptr<Device> device, std::size_t count);
    ~Events();
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;

    std::size_t size() const { return events_.size(); }
    void reset() { recorded_ = 0; }
    void record(std::size_t index, Stream stream);
    /// Makes `stream` wait for it, without blocking. Failed when it has not been recorded: nothing would be waited for.
    void wait(Stream stream, std::size_t index) const;
    bool done(std::size_t index) const;
    void synchronize(std::size_t index) const;

  private:
    Event at(std::size_t index) const;

    std::shared_ptr<Device> device_;
    std::vector<Event> events_;
    std::size_t recorded_ = 0;
};

}  // namespace hicache::cuda
