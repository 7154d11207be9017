#include "gds/lane.hpp"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <utility>

namespace hicache::gds {
namespace {

/// Pieces of a batch, and of all batches of this process that are under way. cuFile takes a buffer of its own for each
/// piece when a batch is submitted, waits where it has none left, and gets them back only when a batch is asked about:
/// of its 64 (posix_pool_slab_count, for each size) two batches may hold all and wait for each other for ever.
constexpr std::size_t kBatch = 12;
constexpr std::size_t kBatched = 4 * kBatch;

/// Room for `count` pieces among kBatched, for as long as this lives.
class Room {
  public:
    explicit Room(std::size_t count) : count_(count) {
        std::unique_lock lock(all().mutex);
        all().given_back.wait(lock, [&] { return all().taken + count_ <= kBatched; });
        all().taken += count_;
    }
    ~Room() {
        {
            const std::lock_guard lock(all().mutex);
            all().taken -= count_;
        }
        all().given_back.notify_all();
    }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;

  private:
    struct All {
        std::mutex mutex;
        std::condition_variable given_back;
        std::size_t taken = 0;
    };
    static All& all() {
        static All& one = *new All;  // threads may wait while the process ends
        return one;
    }
    const std::size_t count_;
};

std::int64_t result_of(ssize_t moved) {
    if (moved >= 0) return moved;
    if (moved == -1) return errno != 0 ? -errno : -EIO;
    return moved;
}

std::int64_t code_of(const Error& error) {
    const int code = error.code < 0 ? -error.code : error.code;
    return -static_cast<std::int64_t>(code != 0 ? code : EIO);
}

}  // namespace

Lane::Lane(std::shared_ptr<Library> of) : library(std::move(of)) {
    cuda::Device::Entered entered(*library->device);
    cuda::check(library->device->api.stream_create(&stream_, cuda::kStreamNonBlocking), "creating a stream");
    const std::size_t limit = library->properties.max_batch;
    batch_size_ = limit != 0 ? std::min(limit, kBatch) : kBatch;
}

Lane::~Lane() {
    if (!library->device->ours()) return;
    try {
        cuda::Device::Entered entered(*library->device);
        library->device->api.stream_synchronize(stream_);
        drop_batch();
        library->device->api.stream_destroy(stream_);
    } catch (const std::exception&) {  // the driver is shutting down
    }
}

void Lane::issue(Way way, bool write, std::vector<Piece> pieces) {
    const Api& api = library->api;
    if (way == Way::batch && (api.batch_setup == nullptr || api.batch_submit == nullptr || api.batch_status == nullptr ||
                              api.batch_destroy == nullptr))
        throw cuda::Unavailable("this cuFile has no batches");
    if (way == Way::stream && (api.read_async == nullptr || api.write_async == nullptr))
        throw cuda::Unavailable("this cuFile has nothing in the order of streams");
    cuda::Device::Entered entered(*library->device);
    pieces_ = std::move(pieces);
    results_.assign(pieces_.size(), -EIO);
    switch (way) {
        case Way::calls: return by_calls(write);
        case Way::batch: return by_batches(write);
        case Way::stream: return by_stream(write);
    }
}

void Lane::by_calls(bool write) {
    for (std::size_t i = 0; i < pieces_.size(); ++i) results_[i] = call(write, pieces_[i]);
}

std::int64_t Lane::call(bool write, const Piece& piece) {
    auto* base = reinterpret_cast<void*>(piece.base);
    errno = 0;
    return result_of(write ? library->api.write(piece.file, base, piece.length, piece.file_offset, piece.base_offset)
                           : library->api.read(piece.file, base, piece.length, piece.file_offset, piece.base_offset));
}

void Lane::by_batches(bool write) {
    for (std::size_t first = 0; first < pieces_.size(); first += batch_size_)
        batch(write, first, std::min(batch_size_, pieces_.size() - first));
}

void Lane::batch(bool write, std::size_t first, std::size_t count) {
    const Api& api = library->api;
    const Room room(count);
    const auto all = [&](std::int64_t result) {
        std::fill_n(results_.begin() + static_cast<std::ptrdiff_t>(first), count, result);
    };
    if (batch_ == nullptr) {
        const Error error = api.batch_setup(&batch_, static_cast<unsigned>(batch_size_));
        if (error.code != 0) {
            batch_ = nullptr;
            return all(code_of(error));
        }
    }
    std::vector<BatchIo> requests(count);
    for (std::size_t i = 0; i < count; ++i) {
        const Piece& piece = pieces_[first + i];
        requests[i] = BatchIo{kBatchMode,        reinterpret_cast<void*>(piece.base),
                              piece.file_offset, piece.base_offset,
                              piece.length,      piece.file,
                              write ? kBatchWrite : kBatchRead, reinterpret_cast<void*>(first + i + 1)};
    }
    const Error submitted = api.batch_submit(batch_, static_cast<unsigned>(count), requests.data(), 0);
    if (submitted.code != 0) {
        drop_batch();
        return all(code_of(submitted));
    }
    std::vector<BatchEvent> events(count);
    for (std::size_t ended = 0; ended < count;) {
        auto number = static_cast<unsigned>(count - ended);
        timespec patience{1, 0};
        const Error error = api.batch_status(batch_, 1, &number, events.data(), &patience);
        if (error.code != 0) {  // whatever is left of it is no page: its checksums say so
            if (api.batch_cancel != nullptr) api.batch_cancel(batch_);
            drop_batch();
            return all(code_of(error));
        }
        for (unsigned i = 0; i < number; ++i) {
            const BatchEvent& event = events[i];
            const auto at = reinterpret_cast<std::size_t>(event.cookie) - 1;
            if (event.status == kWaiting || event.status == kPending || at < first || at >= first + count) continue;
            const auto moved = static_cast<ssize_t>(event.moved);
            results_[at] = event.status == kComplete ? result_of(moved) : moved < -1 ? moved : -EIO;
            ++ended;
        }
    }
    // In compatibility mode a batch moves no more of a piece than a buffer of cuFile's holds, which may be configured.
    for (std::size_t at = first; at < first + count; ++at) {
        Piece rest = pieces_[at];
        if (results_[at] <= 0 || static_cast<std::size_t>(results_[at]) >= rest.length) continue;
        rest.length -= static_cast<std::size_t>(results_[at]);
        rest.file_offset += results_[at];
        rest.base_offset += results_[at];
        const std::int64_t more = call(write, rest);
        results_[at] = more < 0 ? more : results_[at] + more;
    }
}

void Lane::drop_batch() {
    if (batch_ != nullptr) library->api.batch_destroy(batch_);
    batch_ = nullptr;
}

void Lane::by_stream(bool write) {
    streamed_.assign(pieces_.size(), 0);
    streaming_ = true;
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
        Piece& piece = pieces_[i];
        // From its own address on, registered or not: of a base and an offset cuFile (1.15, compatibility mode) at times
        // says that the offset lies behind the memory's end ("exceeds registered length"), which it takes for as long as
        // the piece. What that costs past the CPU is not known, no such machine was to be had: there cuFile may not
        // recognise registered memory by an address within it, and then copies once more on the device.
        piece.base += static_cast<cuda::Address>(std::exchange(piece.base_offset, 0));
        const auto call = write ? library->api.write_async : library->api.read_async;
        const Error error = call(piece.file, reinterpret_cast<void*>(piece.base), &piece.length, &piece.file_offset,
                                 &piece.base_offset, &streamed_[i], stream_);
        if (error.code != 0) streamed_[i] = static_cast<ssize_t>(code_of(error));
    }
}

const std::vector<std::int64_t>& Lane::results() {
    if (!streaming_) return results_;
    cuda::Device::Entered entered(*library->device);
    cuda::check(library->device->api.stream_synchronize(stream_), "waiting for transfers");
    streaming_ = false;
    for (std::size_t i = 0; i < pieces_.size(); ++i) results_[i] = streamed_[i] == -1 ? -EIO : streamed_[i];
    return results_;
}

void Lane::crc32c(const std::uint64_t* addresses, const std::uint32_t* lengths, std::size_t count, std::uint32_t* out,
                  unsigned blocks) {
    try {
        library->device->crc32c(addresses, lengths, count, out, stream_, blocks);
    } catch (...) {  // nothing that was issued before may still be under way when this is heard of
        if (streaming_) {
            cuda::Device::Entered entered(*library->device);
            library->device->api.stream_synchronize(stream_);
        }
        throw;
    }
}

}  // namespace hicache::gds
