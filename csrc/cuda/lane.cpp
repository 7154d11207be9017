#include "lane.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "route.hpp"
#include "shape.hpp"

namespace hicache::cuda {
namespace {

constexpr std::size_t kFewChunks = 1024;
constexpr std::size_t kLists = sizeof(std::uint64_t) + sizeof(std::uint32_t);  // of a chunk: address, length
constexpr std::size_t kOfChunk = kLists + sizeof(std::uint32_t);

/// memory::Mover::move. No exception crosses to the other library.
int move(void* self, const memory::Piece* pieces, std::size_t count, const memory::Chunks* chunks, char* why,
         std::size_t room) {
    try {
        static_cast<CopyLane*>(self)->move(pieces, count, *chunks);
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(why, room, "%s", error.what());
    }
    return 1;
}

}  // namespace

CopyLane::CopyLane(std::shared_ptr<Device> device, unsigned blocks)
    : device_(std::move(device)), blocks_(std::max(1u, blocks)), mover_{this, &cuda::move} {
    if (!device_->no_kernels.empty()) throw Unavailable("no checksums on the device: " + device_->no_kernels);
    Device::Entered entered(*device_);
    try {
        const Api& api = device_->api;
        check(api.stream_create(&copies_, kStreamNonBlocking), "creating a stream");
        check(api.stream_create_with_priority(&checks_, kStreamNonBlocking, kBeforeOthers), "creating a stream");
        check(api.event_create(&copied_, kEventWithoutTiming), "creating an event");
        check(api.event_create(&done_, kEventWithoutTiming | kEventSleeping), "creating an event");
        make_room(kFewChunks);
    } catch (...) {
        give_back();
        throw;
    }
}

CopyLane::~CopyLane() {
    if (!device_->ours()) return;
    try {
        Device::Entered entered(*device_);
        give_back();
    } catch (const std::exception&) {  // the driver is shutting down
    }
}

void CopyLane::give_back() noexcept {
    const Api& api = device_->api;
    if (there_ != 0) api.free(there_);
    if (here_ != nullptr) api.free_host(here_);
    for (Event event : {copied_, done_})
        if (event != nullptr) api.event_destroy(event);
    for (Stream stream : {copies_, checks_})
        if (stream != nullptr) api.stream_destroy(stream);
}

void CopyLane::make_room(std::size_t chunks) {
    if (chunks <= room_) return;
    const Api& api = device_->api;
    if (there_ != 0) api.free(there_);
    if (here_ != nullptr) api.free_host(here_);
    there_ = 0, here_ = nullptr, room_ = 0;
    void* made = nullptr;
    if (api.allocate(&there_, chunks * kLists) != kSuccess || api.allocate_host(&made, chunks * kOfChunk) != kSuccess)
        throw Unavailable("out of memory for a list of " + std::to_string(chunks) + " checksums");
    here_ = static_cast<std::uint8_t*>(made);
    room_ = chunks;
}

/// Their lists are on their way to the device.
void CopyLane::check_chunks(std::size_t count) const {
    ChecksumArguments arguments{
        reinterpret_cast<const std::uint64_t*>(there_),
        reinterpret_cast<const std::uint32_t*>(there_ + count * sizeof(std::uint64_t)),
        reinterpret_cast<std::uint32_t*>(here_ + count * kLists),
        static_cast<std::uint32_t>(count),
    };
    void* parameters[] = {&arguments};
    const auto grid = static_cast<unsigned>(std::min<std::size_t>(blocks_, count));
    check(device_->api.launch(device_->checksum_kernel(), grid, 1, 1, kChecksumThreads, 1, 1, 0, checks_, parameters,
                              nullptr),
          "checksums");
}

void CopyLane::move(const memory::Piece* pieces, std::size_t count, const memory::Chunks& chunks) {
    Device::Entered entered(*device_);
    const std::lock_guard lock(mutex_);
    make_room(chunks.count);
    const Api& api = device_->api;
    const bool first = chunks.count != 0 && chunks.source, last = chunks.count != 0 && !chunks.source;
    std::vector<Run> runs(count);
    for (std::size_t i = 0; i < count; ++i) runs[i] = Run{pieces[i].from, pieces[i].to, pieces[i].bytes};
    try {
        if (chunks.count != 0) {
            std::memcpy(here_, chunks.addresses, chunks.count * sizeof(std::uint64_t));
            std::memcpy(here_ + chunks.count * sizeof(std::uint64_t), chunks.lengths, chunks.count * sizeof(std::uint32_t));
            check(api.copy_async(there_, reinterpret_cast<Address>(here_), chunks.count * kLists, checks_),
                  "checksums: the list");
        }
        if (first) check_chunks(chunks.count);
        issue(api, runs, copies_, true);
        check(api.event_record(copied_, copies_), "recording an event");
        check(api.stream_wait(checks_, copied_, 0), "waiting for copies");
        if (last) check_chunks(chunks.count);
        // Asleep: whoever computes here has better use for the core than to look at a flag.
        check(api.event_record(done_, checks_), "recording an event");
        check(api.event_synchronize(done_), "waiting for copies");
    } catch (...) {
        for (Stream stream : {copies_, checks_}) api.stream_synchronize(stream);  // in error: nothing runs there any more
        throw;
    }
    if (chunks.count != 0)
        std::memcpy(chunks.crcs, here_ + chunks.count * kLists, chunks.count * sizeof(std::uint32_t));
}

}  // namespace hicache::cuda
