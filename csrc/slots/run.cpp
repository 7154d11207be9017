#include "slots/run.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace hicache::slots {
namespace {

/// Bytes of one call, if that is more than a page.
constexpr std::uint64_t kCallBytes = 1 << 20;
constexpr std::size_t kIovMax = 1024;
/// As storage_backends/vectored.py: repeats of what moves nothing, and what O_DIRECT moves at least but for a file's end.
constexpr unsigned kStalls = 16;
constexpr std::uint64_t kSector = 512;
constexpr useconds_t kPause = 1000;

/// How many pages one call moves.
std::size_t step_of(const Run& run) noexcept {
    const std::size_t by_bytes = kCallBytes / run.slot_bytes, by_buffers = kIovMax / (run.shape.lengths.size() + 2);
    return std::max<std::size_t>(1, std::min(by_bytes, by_buffers));
}

std::vector<iovec> spans(const Run& run, std::size_t first, std::size_t last) {
    const std::uint64_t payload = run.shape.payload_bytes(), pad = run.slot_bytes - run.shape.header_bytes - payload;
    std::vector<iovec> iov;
    iov.reserve((last - first) * (run.shape.lengths.size() + 2));
    const auto add = [&](std::uint8_t* at, std::uint64_t length) {
        if (length == 0) return;
        if (!iov.empty() && static_cast<std::uint8_t*>(iov.back().iov_base) + iov.back().iov_len == at)
            iov.back().iov_len += length;
        else
            iov.push_back({at, length});
    };
    for (std::size_t page = first; page < last; ++page) {
        add(run.header(page), run.shape.header_bytes);
        const auto buffers = run.buffers(page);
        for (std::size_t i = 0; i < buffers.size(); ++i) add(buffers[i], run.shape.lengths[i]);
        add(run.pad != nullptr ? run.pad : run.header(page) + run.shape.header_bytes + payload, pad);
    }
    return iov;
}

/// Moves all of `iov`: bytes (fewer at the end of a file), or -errno. A page of more buffers than a call takes is moved by
/// several.
std::int64_t move(int fd, std::uint64_t offset, std::vector<iovec> iov, bool write) noexcept {
    std::uint64_t moved = 0;
    unsigned stalls = 0;
    for (std::size_t at = 0; at < iov.size();) {
        const int count = static_cast<int>(std::min(iov.size() - at, kIovMax));
        const auto where = static_cast<off_t>(offset + moved);
        const ssize_t result = write ? pwritev(fd, &iov[at], count, where) : preadv(fd, &iov[at], count, where);
        if (result < 0) {
            if ((errno == EINTR || errno == EAGAIN) && stalls++ < kStalls) {
                if (errno == EAGAIN) usleep(kPause);
                continue;
            }
            if (errno == EINVAL && !write && moved % kSector != 0) break;  // after the tail of a file nothing is aligned
            return -errno;
        }
        if (result == 0) break;
        stalls = 0;
        moved += static_cast<std::uint64_t>(result);
        for (auto left = static_cast<std::size_t>(result); left != 0;) {
            const std::size_t take = std::min(left, iov[at].iov_len);
            iov[at].iov_base = static_cast<std::uint8_t*>(iov[at].iov_base) + take;
            iov[at].iov_len -= take;
            left -= take;
            if (iov[at].iov_len == 0) ++at;
        }
    }
    return static_cast<std::int64_t>(moved);
}

std::vector<const std::uint8_t*> constant(std::span<std::uint8_t* const> buffers) {
    return {buffers.begin(), buffers.end()};
}

void seal_page(const Run& run, std::size_t page) { io::seal(run.shape, run.header(page), constant(run.buffers(page))); }

std::uint8_t verdict_of(const Run& run, const std::uint8_t* keys, std::size_t page, std::uint64_t there) {
    return static_cast<std::uint8_t>(
        io::verify(run.shape, keys + 32 * page, run.header(page), constant(run.buffers(page)), there));
}

}  // namespace

void seal(const Run& run) noexcept {
    for (std::size_t page = 0; page < run.pages(); ++page) seal_page(run, page);
}

void judge(const Run& run, const std::uint8_t* keys, std::uint8_t* verdicts) noexcept {
    for (std::size_t page = 0; page < run.pages(); ++page) verdicts[page] = verdict_of(run, keys, page, ~std::uint64_t{0});
}

Written write(const Run& run) {
    const std::size_t step = step_of(run);
    for (std::size_t first = 0; first < run.pages(); first += step) {
        const std::size_t last = std::min(first + step, run.pages());
        for (std::size_t page = first; page < last; ++page) seal_page(run, page);
        const std::int64_t moved = move(run.fd, run.offset + first * run.slot_bytes, spans(run, first, last), true);
        if (moved < 0) return {first, static_cast<int>(-moved)};
        const std::uint64_t whole = static_cast<std::uint64_t>(moved) / run.slot_bytes;
        if (whole < last - first) return {first + whole, EIO};
    }
    return {run.pages(), 0};
}

void read(const Run& run, const std::uint8_t* keys, std::uint8_t* verdicts, std::int32_t* errors) {
    const std::size_t step = step_of(run);
    for (std::size_t first = 0; first < run.pages(); first += step) {
        const std::size_t last = std::min(first + step, run.pages());
        const std::int64_t moved = move(run.fd, run.offset + first * run.slot_bytes, spans(run, first, last), false);
        for (std::size_t page = first; page < last; ++page) {
            errors[page] = moved < 0 ? static_cast<std::int32_t>(-moved) : 0;
            const std::uint64_t before = (page - first) * run.slot_bytes, bytes = moved < 0 ? 0 : static_cast<std::uint64_t>(moved);
            verdicts[page] = verdict_of(run, keys, page, bytes > before ? bytes - before : 0);
        }
    }
}

}  // namespace hicache::slots
