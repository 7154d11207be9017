// The memory of a region's extents, taken from the kernel as they fill, and a little ahead of that.
//
// Memory that the kernel has not given yet costs whoever touches it first more time than the copy of a page, and ends the
// process (SIGBUS) where there is none left. So it is asked for, and refused, before an extent is opened.
//
// Belongs here: which extents have theirs. Does not belong here: which are free, or how much is wanted ahead.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace hicache::memory {

/// One process's. Thread-safe: taking what is there already changes nothing.
class Supply {
  public:
    /// data: the first extent. file_at: where that is in the file `fd`; fd -1: memory without a file.
    Supply(std::uint8_t* data, std::uint64_t file_at, std::uint64_t extent_bytes, std::uint64_t extents, int fd);

    bool ready(std::uint32_t extent) const noexcept { return ready_[extent].load(std::memory_order_acquire); }

    /// All memory of an extent; false: there is not enough.
    bool take(std::uint32_t extent) noexcept;

    /// The next piece of an extent's; false: there is not enough. For one thread at a time.
    bool take_some(std::uint32_t extent, std::uint64_t bytes) noexcept;

  private:
    bool take(std::uint64_t from, std::uint64_t length) noexcept;

    std::uint8_t* const data_;
    const std::uint64_t file_at_, extent_bytes_;
    const int fd_;
    std::vector<std::atomic<bool>> ready_;
    std::uint32_t begun_ = ~0u;  // the extent of the last piece, and how much of it there is
    std::uint64_t done_ = 0;
};

}  // namespace hicache::memory
