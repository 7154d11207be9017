// Copies between pinned memory and a device's, with checksums of the device's side: one caller, one part at a time. Lanes
// of one device do not wait for each other.
//
// Copies and checksums have a stream each. What is copied from the device is checked while it is copied. Checksums come
// before whatever else computes there, on few multiprocessors: the blocks of a forward's kernels are many, and who waits
// behind them waits for milliseconds. They are written straight into host memory: a copy of them would wait its turn
// behind the pages of other lanes.
//
// Does not belong here: what the bytes are, or who wants them.
#pragma once

#include <memory>
#include <mutex>

#include "device.hpp"
#include "memory/mover.hpp"

namespace hicache::cuda {

class CopyLane {
  public:
    /// blocks: of the checksum kernel. Unavailable: no kernels, no memory. Failed: no stream.
    CopyLane(std::shared_ptr<Device> device, unsigned blocks);
    ~CopyLane();
    CopyLane(const CopyLane&) = delete;
    CopyLane& operator=(const CopyLane&) = delete;

    /// Copies all pieces, computes the chunks' checksums (memory::Mover), and returns when both are there. After
    /// Unavailable and Failed nothing of it is under way.
    void move(const memory::Piece* pieces, std::size_t count, const memory::Chunks& chunks);

    const memory::Mover& mover() const { return mover_; }

  private:
    void make_room(std::size_t chunks);
    void check_chunks(std::size_t count) const;
    void give_back() noexcept;

    std::shared_ptr<Device> device_;
    const unsigned blocks_;
    memory::Mover mover_;
    std::mutex mutex_;
    Stream copies_ = nullptr, checks_ = nullptr;
    Event copied_ = nullptr, done_ = nullptr;
    // Lists of chunks: here, where the driver copies from without another copy, and there. Behind them, here, the checksums.
    std::uint8_t* here_ = nullptr;
    Address there_ = 0;
    std::size_t room_ = 0;  // chunks
};

}  // namespace hicache::cuda
