#include "io/ring.hpp"

#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace hicache::io {
namespace {

constexpr std::uint64_t kWake = ~std::uint64_t{0};
constexpr std::uint64_t kNobody = kWake - 1;  // requests whose completion tells nothing
constexpr unsigned kBufferTable = 1024;
constexpr unsigned kFileTable = 256;  // the kernel refuses a table larger than the limit of open files
/// The kernel registers at most 1 GiB at once.
constexpr std::uint64_t kPieceBytes = std::uint64_t{1} << 30;
/// Buffers at least this large in registered memory become requests of their own. Below, one request for the whole
/// page costs less CPU than the look-up of its memory does; devices count requests too.
constexpr std::uint64_t kFixedBytes = 256 << 10;
constexpr std::uint32_t kIovMax = 1024;
/// Repeats of a request that moves nothing, after which its error is the page's: a device may say EAGAIN for ever.
constexpr unsigned kStalls = 16;
constexpr std::uint64_t kSector = 512;  // O_DIRECT moves whole sectors except at the end of a file

[[noreturn]] void unavailable(int error) {
    switch (error) {
        case ENOSYS: throw Unavailable("this kernel has no io_uring");
        case EPERM:
        case EACCES: throw Unavailable("io_uring is forbidden here (seccomp profile or sysctl kernel.io_uring_disabled)");
        case ENOMEM: throw Unavailable("the limit of locked memory (ulimit -l) is too low for a ring");
        default: throw Unavailable(std::string("io_uring_setup: ") + std::strerror(error));
    }
}

}  // namespace

Ring::Ring(Shared& shared) : shared_(shared) {
    setup();
    wake_fd_ = eventfd(0, EFD_CLOEXEC);
    if (wake_fd_ < 0) {
        const int error = errno;
        io_uring_queue_exit(&ring_);
        throw Unavailable(std::string("eventfd: ") + std::strerror(error));
    }
    io_uring_ring_dontfork(&ring_);
    // Older kernels have no sparse tables, and a low limit may refuse them: then nothing is registered.
    if (io_uring_register_buffers_sparse(&ring_, kBufferTable) == 0)
        for (int i = kBufferTable; i-- > 0;) free_buffers_.push_back(i);
    if (io_uring_register_files_sparse(&ring_, kFileTable) == 0)
        for (int i = kFileTable; i-- > 0;) free_files_.push_back(i);
    flights_.resize(shared.options.depth);
    for (unsigned i = shared.options.depth; i-- > 0;) free_.push_back(i);
}

Ring::~Ring() {
    io_uring_queue_exit(&ring_);
    close(wake_fd_);
}

void Ring::setup() {
    const auto& options = shared_.options;
    // The cheapest mode first: completions are run when this thread asks for them, and by nobody else.
    constexpr unsigned kOwn = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
                              IORING_SETUP_COOP_TASKRUN | IORING_SETUP_R_DISABLED;
    constexpr unsigned kCoop = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    const std::vector<unsigned> modes = options.sqpoll ? std::vector<unsigned>{IORING_SETUP_SQPOLL}
                                                       : std::vector<unsigned>{kOwn, kCoop, 0};
    int result = -EINVAL;
    for (const unsigned mode : modes) {
        io_uring_params params{};
        params.flags = mode | IORING_SETUP_CQSIZE | (options.iopoll ? IORING_SETUP_IOPOLL : 0u);
        params.cq_entries = options.depth * kPieces + 64;
        params.sq_thread_idle = 50;
        result = io_uring_queue_init_params(std::min(options.depth * 4, 4096u), &ring_, &params);
        if (result == 0) {
            flags_ = params.flags;
            return;
        }
        if (result != -EINVAL) break;
    }
    unavailable(-result);
}

void Ring::run() {
    // The ring belongs to the thread that enables it. By system call: liburing 2.3 does not export its function.
    if (flags_ & IORING_SETUP_R_DISABLED)
        syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
    bool idle = false;
    for (;;) {
        const std::size_t room = waiting_.empty() ? free_.size() : 0;
        const std::size_t had = waiting_.size();
        Shared::Work work = shared_.take(*this, room, waiting_, idle);
        for (auto& control : work.controls) control(*this);
        if (work.stop && !closing_) cancel_all();
        const bool flying = free_.size() < flights_.size();
        if (work.stop && !flying && waiting_.empty() && landed_.empty()) return;
        if (idle && waiting_.size() == had && work.controls.empty()) sleep();
        while (!waiting_.empty() && !free_.empty()) {
            const Batch::Item item = std::move(waiting_.front());
            waiting_.pop_front();
            const bool seals = item->write && item.batch->slots;
            begin(item);
            if (seals) break;  // a checksum took its time: let the device have the page, and see what came back
        }
        submit();
        collect();
        if (!landed_.empty()) {
            Landed landed = std::move(landed_.front());
            landed_.pop_front();
            judge(landed);
        }
        idle = landed_.empty() && (waiting_.empty() || free_.empty());
    }
}

void Ring::wake() noexcept {
    asleep = false;
    eventfd_write(wake_fd_, 1);
}

// ---------------------------------------------------------------- a page's way out

void Ring::begin(const Batch::Item& item) {
    const Page& page = *item;
    if (closing_ || (page.cancelled != nullptr && __atomic_load_n(page.cancelled, __ATOMIC_ACQUIRE) != 0))
        return finish(item, -ECANCELED, Verdict::kUnchecked);
    if (page.write && item.batch->slots) {
        const Slots& slots = *item.batch->slots;
        const iovec& head = item.batch->buffers[page.first];
        auto* header = static_cast<std::uint8_t*>(head.iov_base);
        locate(item);
        if (!slots.copies.empty()) {
            std::uint8_t* end = header + slots.shape.header_bytes;
            for (std::size_t i = 0; i < payload_.size(); ++i) {
                const std::uint64_t length = slots.shape.lengths[i];
                std::memcpy(end, slots.copies[item.page * payload_.size() + i], length);
                end += length;
            }
            std::memset(end, 0, header + head.iov_len - end);
        }
        seal(slots.shape, header, payload_);
    }
    const unsigned number = free_.back();
    Flight& flight = flights_[number];
    flight.item = item;
    cut(page, flight);
    if (flight.pieces == 0) return finish(item, 0, Verdict::kUnchecked);
    free_.pop_back();
    flight.file = registered_file(page);
    flight.open = flight.pieces;
    for (unsigned i = 0; i < flight.pieces; ++i) prepare(number, i);
}

void Ring::cut(const Page& page, Flight& flight) {
    const iovec* buffers = flight.item.batch->buffers.data();
    flight.pieces = 0;
    std::uint64_t offset = page.offset;
    for (std::uint32_t i = page.first; i < page.first + page.count; ++i) {
        const std::uint64_t length = buffers[i].iov_len;
        if (length == 0) continue;
        Piece* last = flight.pieces ? &flight.piece[flight.pieces - 1] : nullptr;
        const int buffer = flight.pieces + 1 < kPieces && length >= kFixedBytes ? registered_buffer(buffers[i]) : -1;
        if (buffer >= 0 || last == nullptr || last->buffer >= 0) {
            last = &flight.piece[flight.pieces++];
            last->offset = offset;
            last->length = last->moved = 0;
            last->first = i;
            last->buffer = buffer;
            last->async = false;
            last->stalls = 0;
        }
        last->count = i + 1 - last->first;
        last->length += length;
        offset += length;
    }
}

void Ring::prepare(unsigned number, unsigned index) {
    const Flight& flight = flights_[number];
    Piece& piece = flights_[number].piece[index];
    const bool write = flight.item->write;
    const int fd = flight.file >= 0 ? flight.file : flight.item->fd;
    const std::uint64_t offset = piece.offset + piece.moved;
    const iovec* buffers = flight.item.batch->buffers.data() + piece.first;
    std::uint32_t count = piece.count;
    if (piece.moved != 0) {
        piece.rest.clear();
        std::uint64_t skip = piece.moved;
        for (std::uint32_t i = 0; i < count; ++i) {
            const std::uint64_t length = buffers[i].iov_len;
            if (skip < length)
                piece.rest.push_back({static_cast<std::uint8_t*>(buffers[i].iov_base) + skip, length - skip});
            skip -= std::min(skip, length);
        }
        buffers = piece.rest.data();
        count = static_cast<std::uint32_t>(piece.rest.size());
    }
    io_uring_sqe* sqe = next_sqe();
    if (count == 1) {
        void* base = buffers->iov_base;
        const auto length = static_cast<unsigned>(std::min<std::uint64_t>(buffers->iov_len, kPieceBytes));
        if (piece.buffer >= 0 && write)
            io_uring_prep_write_fixed(sqe, fd, base, length, offset, piece.buffer);
        else if (piece.buffer >= 0)
            io_uring_prep_read_fixed(sqe, fd, base, length, offset, piece.buffer);
        else if (write)
            io_uring_prep_write(sqe, fd, base, length, offset);
        else
            io_uring_prep_read(sqe, fd, base, length, offset);
    } else if (write) {
        io_uring_prep_writev(sqe, fd, buffers, std::min(count, kIovMax), offset);
    } else {
        io_uring_prep_readv(sqe, fd, buffers, std::min(count, kIovMax), offset);
    }
    unsigned flags = 0;
    if (flight.file >= 0) flags |= IOSQE_FIXED_FILE;
    if (piece.async) flags |= IOSQE_ASYNC;
    io_uring_sqe_set_flags(sqe, flags);
    io_uring_sqe_set_data64(sqe, std::uint64_t{number} * kPieces + index);
}

io_uring_sqe* Ring::next_sqe() {
    for (;;) {
        if (io_uring_sqe* sqe = io_uring_get_sqe(&ring_)) return sqe;
        submit();
        if (flags_ & IORING_SETUP_SQPOLL) io_uring_sqring_wait(&ring_);
    }
}

// One call for all that was prepared; it also runs what completed, where the ring's mode leaves that to us.
void Ring::submit() {
    const bool ready = io_uring_sq_ready(&ring_) != 0;
    const bool due = (IO_URING_READ_ONCE(*ring_.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
    if (!ready && !due && !(flags_ & IORING_SETUP_IOPOLL)) return;
    const int result = io_uring_submit_and_get_events(&ring_);
    // No memory for the requests, or completions must be taken first: both pass.
    if (result == -EAGAIN || result == -EBUSY || result == -ENOMEM) usleep(1000);
}

void Ring::sleep() {
    if (flags_ & IORING_SETUP_IOPOLL) {  // such a ring takes no reads of an eventfd; it polls only while it must
        if (free_.size() < flights_.size())
            io_uring_submit_and_wait(&ring_, 1);
        else
            eventfd_read(wake_fd_, &wake_count_);
        return;
    }
    if (!listening_) {
        io_uring_sqe* sqe = next_sqe();
        io_uring_prep_read(sqe, wake_fd_, &wake_count_, sizeof wake_count_, 0);
        io_uring_sqe_set_data64(sqe, kWake);
        listening_ = true;
    }
    const int result = io_uring_submit_and_wait(&ring_, 1);
    if (result < 0 && result != -EINTR) usleep(1000);
}

void Ring::cancel_all() {
    closing_ = true;
    if (flags_ & IORING_SETUP_IOPOLL || free_.size() == flights_.size()) return;
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_cancel64(sqe, 0, IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL);
    io_uring_sqe_set_data64(sqe, kNobody);
}

// ---------------------------------------------------------------- and back

void Ring::collect() {
    for (;;) {
        io_uring_cqe* found[64];
        const unsigned count = io_uring_peek_batch_cqe(&ring_, found, 64);
        if (count == 0) return;
        struct {
            std::uint64_t data;
            int result;
        } copied[64];
        for (unsigned i = 0; i < count; ++i) copied[i] = {found[i]->user_data, found[i]->res};
        io_uring_cq_advance(&ring_, count);
        for (unsigned i = 0; i < count; ++i) {
            if (copied[i].data == kWake)
                listening_ = false;
            else if (copied[i].data != kNobody)
                completed(static_cast<unsigned>(copied[i].data / kPieces),
                          static_cast<unsigned>(copied[i].data % kPieces), copied[i].result);
        }
    }
}

void Ring::completed(unsigned number, unsigned index, int result) {
    Flight& flight = flights_[number];
    Piece& piece = flight.piece[index];
    if ((result == -EINTR || result == -EAGAIN) && piece.stalls < kStalls) {
        ++piece.stalls;
        // The kernel's own worker may block where the submission may not.
        piece.async = piece.async || result == -EAGAIN;
        return prepare(number, index);
    }
    if (result == -EINVAL && !flight.item->write && piece.moved % kSector != 0)
        result = 0;  // O_DIRECT read the file's tail, and what comes after it is not aligned
    if (result > 0) {
        piece.moved += static_cast<unsigned>(result);
        piece.stalls = 0;
        if (piece.moved < piece.length) return prepare(number, index);
    }
    piece.result = result < 0 ? result : static_cast<std::int64_t>(piece.moved);
    if (--flight.open != 0) return;
    std::int64_t moved = 0;
    for (unsigned i = 0; i < flight.pieces; ++i) {
        if (flight.piece[i].result < 0) {
            moved = flight.piece[i].result;
            break;
        }
        moved += flight.piece[i].result;
        if (flight.piece[i].moved < flight.piece[i].length) break;  // the file ends here
    }
    // The place is free for the next page before this one is judged.
    Batch::Item item = std::move(flight.item);
    free_.push_back(number);
    if (moved < 0 || item->write || !item.batch->slots)
        finish(item, moved, Verdict::kUnchecked);
    else
        landed_.push_back({std::move(item), moved});
}

void Ring::locate(const Batch::Item& item) {
    const Slots& slots = *item.batch->slots;
    const iovec* buffers = item.batch->buffers.data() + item->first;
    payload_.clear();
    auto* at = static_cast<const std::uint8_t*>(buffers->iov_base) + slots.shape.header_bytes;
    for (std::size_t i = 0; i < slots.shape.lengths.size(); ++i) {
        payload_.push_back(slots.copies.empty() ? static_cast<const std::uint8_t*>(buffers[i + 1].iov_base) : at);
        at += slots.shape.lengths[i];
    }
}

void Ring::judge(const Landed& landed) {
    const Batch::Item& item = landed.item;
    const Slots& slots = *item.batch->slots;
    locate(item);
    const Verdict verdict = verify(
        slots.shape, slots.keys.data() + std::size_t{32} * item.page,
        static_cast<const std::uint8_t*>(item.batch->buffers[item->first].iov_base), payload_,
        static_cast<std::uint64_t>(landed.moved));
    if (verdict == Verdict::kValid && !slots.copies.empty())
        for (std::size_t i = 0; i < payload_.size(); ++i)
            std::memcpy(slots.copies[item.page * payload_.size() + i], payload_[i], slots.shape.lengths[i]);
    finish(item, landed.moved, verdict);
}

void Ring::finish(const Batch::Item& item, std::int64_t moved, Verdict verdict) {
    shared_.post(*item.batch, item.page, moved, verdict);
}

// ---------------------------------------------------------------- registration

int Ring::register_memory(std::uint64_t address, std::uint64_t length) {
    // Memory that was there before may have been unmapped since: the table would still name its old pages.
    std::erase_if(memory_, [&](const Registered& known) {
        if (known.end <= address || known.begin >= address + length) return false;
        const iovec none{};
        io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(known.index), &none, nullptr, 1);
        free_buffers_.push_back(known.index);
        registered_bytes -= known.end - known.begin;
        return true;
    });
    for (std::uint64_t at = address; at < address + length;) {
        if (free_buffers_.empty()) return ENOSPC;
        const std::uint64_t bytes = std::min(kPieceBytes, address + length - at);
        const iovec piece{reinterpret_cast<void*>(at), bytes};
        const int index = free_buffers_.back();
        const int result =
            io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(index), &piece, nullptr, 1);
        if (result < 0) return -result;
        free_buffers_.pop_back();
        memory_.push_back({at, at + bytes, index});
        registered_bytes += bytes;
        at += bytes;
    }
    return 0;
}

int Ring::registered_buffer(const iovec& buffer) const noexcept {
    const auto begin = reinterpret_cast<std::uint64_t>(buffer.iov_base);
    for (const Registered& known : memory_)
        if (known.begin <= begin && begin + buffer.iov_len <= known.end) return known.index;
    return -1;
}

int Ring::registered_file(const Page& page) {
    if (page.file == 0) return -1;
    if (const auto known = files_.find(page.file); known != files_.end()) return known->second;
    if (free_files_.empty()) return -1;
    const int index = free_files_.back();
    if (io_uring_register_files_update(&ring_, static_cast<unsigned>(index), &page.fd, 1) != 1) return -1;
    free_files_.pop_back();
    files_.emplace(page.file, index);
    return index;
}

void Ring::retain(const std::vector<std::uint64_t>& files) {
    std::erase_if(files_, [&](const auto& known) {
        if (std::find(files.begin(), files.end(), known.first) != files.end()) return false;
        const int none = -1;
        io_uring_register_files_update(&ring_, static_cast<unsigned>(known.second), &none, 1);
        free_files_.push_back(known.second);
        return true;
    });
}

}  // namespace hicache::io
