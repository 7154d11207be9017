// Blocks between two sides, by three ways: copy engines, a kernel, a kernel with a stage on the device.
//
// A side is addresses (shape.hpp). Nothing here knows what a layer, a token or a type is.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "device.hpp"

namespace hicache::cuda {

struct Side {
    std::vector<Address> planes;
    std::int64_t token = 0, head = 0;  // strides in bytes
};

/// Bytes that lie together on both sides.
struct Run {
    Address from, to;
    std::size_t bytes;
};

/// By the copy engines, in as few calls as the driver allows. batch: cuMemcpyBatchAsync where there is one.
void issue(const Api& api, const std::vector<Run>& runs, Stream stream, bool batch);

struct Blocks {
    Side a, b;
    std::uint32_t tokens = 1, heads = 1;
    std::uint64_t run = 0;

    /// Runs of `planes` planes from `first` and of all pages, those that touch joined.
    std::vector<Run> runs(bool to_b, std::size_t first, std::size_t planes, const std::uint64_t* a_pages,
                          const std::uint64_t* b_pages, std::size_t pages) const;
};

/// How side b's bytes lie in the stage: a page is `spans` stretches of `span_bytes` contiguous bytes each, stretch s
/// from b.planes' origin + starts[s]; plane p's first run begins `at[p]` bytes into stretch `span_of[p]`.
struct Spans {
    std::uint64_t span_bytes = 0;
    std::vector<Address> starts;
    std::vector<std::uint64_t> at;
    std::vector<std::uint32_t> span_of;
};

/// Two halves of device memory and a stream that copies into or out of one while a kernel works on the other.
class Stage {
  public:
    /// Unavailable: too little device memory.
    Stage(std::shared_ptr<Device> device, std::size_t half_bytes);
    ~Stage();
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

    const std::size_t half_bytes;
    std::mutex mutex;
    Stream stream = nullptr;
    Event begun = nullptr, filled[2] = {}, emptied[2] = {};
    Address half(std::size_t which) const { return memory_.address + which * half_bytes; }

  private:
    std::shared_ptr<Device> device_;
    DeviceMemory memory_;
};

class Route {
  public:
    /// The planes of both sides are put on the device. Unavailable: too little device memory.
    Route(std::shared_ptr<Device> device, Blocks blocks, std::optional<Spans> spans);

    struct Pages {
        bool to_b;
        std::size_t first, planes;
        const std::uint64_t* a;
        const std::uint64_t* b;
        std::size_t count;
    };

    /// By the copy engines, in as few calls as runs and driver allow. batch: cuMemcpyBatchAsync where there is one.
    void by_engine(const Pages& pages, Stream stream, bool batch) const;
    /// By a kernel on `blocks` thread blocks, which are on at most as many multiprocessors.
    void by_kernel(const Pages& pages, Stream stream, unsigned blocks) const;
    /// By a kernel between side a and the stage, and large copies between the stage and side b. All planes.
    void by_stage(const Pages& pages, Stream stream, unsigned blocks, Stage& stage) const;

    const Blocks& blocks() const { return blocks_; }

  private:
    void launch(const Side& from, const Side& to, Address from_planes, Address to_planes, std::size_t planes,
                const std::uint64_t* from_pages, const std::uint64_t* to_pages, std::size_t pages, bool planes_inside,
                std::uint64_t alignment, Stream stream, unsigned blocks) const;

    void issue(const std::vector<Run>& runs, Stream stream, bool batch) const {
        cuda::issue(device_->api, runs, stream, batch);
    }

    std::shared_ptr<Device> device_;
    Blocks blocks_;
    std::optional<Spans> spans_;
    DeviceMemory tables_;
    std::uint64_t alignment_ = 0;
    bool planes_inside_ = false;
    mutable std::mutex stage_planes_mutex_;
    mutable std::size_t stage_planes_for_ = 0;
};

/// Something failed half-way: returns when nothing of it can touch memory any more.
void settle(const Device& device, Stream stream, const Stage* stage);

}  // namespace hicache::cuda
