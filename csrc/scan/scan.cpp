#include "scan/scan.hpp"

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace hicache::scan {
namespace {

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kMostHeader = 1 << 20;  // more than the header of any page that fits an extent

/// Memory for O_DIRECT that grows.
class Room {
public:
    std::uint8_t* of(std::size_t size) {
        if (size > size_) {
            memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kBlock, size)));
            size_ = memory_ ? size : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(std::uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<std::uint8_t, Free> memory_;
    std::size_t size_ = 0;
};

/// Bytes read, up to `size` and to the file's end; 0 for an error.
std::size_t read_at(int fd, std::uint8_t* to, std::size_t size, std::uint64_t offset) {
    for (;;) {
        const ssize_t got = ::pread(fd, to, size, static_cast<off_t>(offset));
        if (got >= 0) return static_cast<std::size_t>(got);
        if (errno != EINTR) return 0;
    }
}

bool read_header(int fd, std::uint64_t offset, std::uint64_t slot_bytes, Room& room, io::SlotPage& page) {
    std::size_t got = read_at(fd, room.of(kBlock), kBlock, offset);
    if (got < kBlock) return false;
    const std::uint64_t size = io::claimed_header_bytes(room.of(kBlock));
    if (size > std::min<std::uint64_t>(slot_bytes, kMostHeader)) return false;
    if (size > kBlock && size % kBlock == 0) got = read_at(fd, room.of(size), size, offset);
    return io::describe(room.of(kBlock), got, slot_bytes, page);
}

}  // namespace

std::vector<Found> headers(int fd, std::uint64_t base, std::uint64_t slot_bytes, std::span<const std::uint32_t> slots,
                           unsigned threads, const std::uint8_t* cancelled) {
    std::vector<Found> results(slots.size());
    std::vector<std::uint8_t> whole(slots.size(), 0);
    std::atomic<std::size_t> next{0};
    const auto work = [&]() noexcept {
        Room room;
        for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < slots.size();) {
            if (cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_ACQUIRE) != 0) return;
            try {
                results[i].slot = slots[i];
                whole[i] = read_header(fd, base + slots[i] * slot_bytes, slot_bytes, room, results[i].page);
            } catch (const std::bad_alloc&) {
            }
        }
    };
    std::vector<std::thread> helpers;
    try {
        while (helpers.size() + 1 < std::min<std::size_t>(threads, slots.size())) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // as many as the machine allows
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    std::size_t kept = 0;
    for (std::size_t i = 0; i < slots.size(); ++i)
        if (whole[i]) results[kept++] = results[i];
    results.resize(kept);
    return results;
}

}  // namespace hicache::scan
