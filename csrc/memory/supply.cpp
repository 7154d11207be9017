#include "memory/supply.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "memory/layout.hpp"

namespace hicache::memory {

Supply::Supply(std::uint8_t* data, std::uint64_t file_at, std::uint64_t extent_bytes, std::uint64_t extents, int fd)
    : data_(data), file_at_(file_at), extent_bytes_(extent_bytes), fd_(fd), ready_(extents) {}

bool Supply::take(std::uint32_t extent) noexcept {
    if (ready(extent)) return true;
    if (!take(extent * extent_bytes_, extent_bytes_)) return false;
    ready_[extent].store(true, std::memory_order_release);
    return true;
}

bool Supply::take_some(std::uint32_t extent, std::uint64_t bytes) noexcept {
    if (begun_ != extent) begun_ = extent, done_ = 0;
    const std::uint64_t length = std::min(bytes, extent_bytes_ - done_);
    if (!take(extent * extent_bytes_ + done_, length)) return false;
    done_ += length;
    if (done_ == extent_bytes_) ready_[extent].store(true, std::memory_order_release);
    return true;
}

bool Supply::take(std::uint64_t from, std::uint64_t length) noexcept {
    if (fd_ >= 0)
        while (fallocate(fd_, 0, static_cast<off_t>(file_at_ + from), static_cast<off_t>(length)) != 0)
            if (errno != EINTR) return false;
#ifdef MADV_POPULATE_WRITE
    while (madvise(data_ + from, length, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        return errno == EINVAL;  // a kernel without it gives the memory at the first touch
    }
#endif
    return true;
}

}  // namespace hicache::memory
