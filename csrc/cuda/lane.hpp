// Copies between pinned memory and a device's, with checksums of the device's side: one caller, one stream, one part at a
// time. Lanes of one device do not wait for each other.
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

    /// Copies all pieces, computes the chunks' checksums after that, and returns when both are there. After Unavailable
    /// and Failed nothing of it is under way.
    void move(const memory::Piece* pieces, std::size_t count, const memory::Chunks& chunks);

    const memory::Mover& mover() const { return mover_; }

  private:
    void make_room(std::size_t chunks);
    void give_back() noexcept;

    std::shared_ptr<Device> device_;
    const unsigned blocks_;
    memory::Mover mover_;
    std::mutex mutex_;
    Stream stream_ = nullptr;
    Event done_ = nullptr;
    // Lists of chunks, and their checksums behind them: here, where the driver copies from without another copy, and there.
    std::uint8_t* here_ = nullptr;
    Address there_ = 0;
    std::size_t room_ = 0;  // chunks
};

}  // namespace hicache::cuda
