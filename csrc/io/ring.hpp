// One ring and its thread: begins pages, continues short ones, checksums what arrived, posts ends.
//
// Belongs here: io_uring. Does not belong here: the queue (engine.hpp), or what a slot's bytes mean (slot.hpp).
#pragma once

#include <liburing.h>

#include <atomic>
#include <deque>
#include <functional>
#include <unordered_map>
#include <vector>

#include "io/batch.hpp"
#include "io/engine.hpp"

namespace hicache::io {

class Ring {
public:
    /// Throws Unavailable.
    explicit Ring(Shared& shared);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    /// The thread: until the engine closes and nothing is in flight.
    void run();
    /// From any thread, under the queue's lock: ends the sleep that `asleep` tells of.
    void wake() noexcept;
    // Under the queue's lock. hungry: it has room for pages.
    bool asleep = false;
    bool hungry = false;
    std::vector<std::function<void(Ring&)>> controls;

    // On the ring's thread only (Shared::control).
    /// 0, or the errno of the first piece that could not be registered.
    int register_memory(std::uint64_t address, std::uint64_t length);
    void retain(const std::vector<std::uint64_t>& files);

    std::atomic<std::uint64_t> registered_bytes{0};
    unsigned setup_flags() const noexcept { return flags_; }

private:
    /// A run of a page's buffers that is one request. Large buffers in registered memory have one of their own,
    /// since the kernel then need not look up and pin their pages; the others travel together.
    struct Piece {
        std::uint64_t offset = 0;  // in the file
        std::uint64_t length = 0;
        std::uint64_t moved = 0;
        std::uint32_t first = 0;
        std::uint32_t count = 0;
        int buffer = -1;  // index of the registered memory, or -1
        bool async = false;
        unsigned stalls = 0;  // completions in a row that moved nothing and asked for a repeat
        std::int64_t result = 0;
        std::vector<iovec> rest;  // what a short transfer left
    };
    static constexpr unsigned kPieces = 8;

    struct Flight {
        Batch::Item item;
        unsigned pieces = 0;
        unsigned open = 0;
        int file = -1;  // index of the registered file, or -1
        Piece piece[kPieces];
    };

    struct Landed {
        Batch::Item item;
        std::int64_t moved;
    };

    struct Registered {
        std::uint64_t begin;
        std::uint64_t end;
        int index;
    };

    void setup();
    void begin(const Batch::Item& item);
    void cut(const Page& page, Flight& flight);
    void prepare(unsigned flight, unsigned piece);
    io_uring_sqe* next_sqe();
    void submit();
    void sleep();
    void cancel_all();
    void collect();
    void completed(unsigned flight, unsigned piece, int result);
    /// Fills `payload_` with where the page's payload lies while it travels.
    void locate(const Batch::Item& item);
    void judge(const Landed& landed);
    void finish(const Batch::Item& item, std::int64_t moved, Verdict verdict);
    int registered_file(const Page& page);
    int registered_buffer(const iovec& buffer) const noexcept;

    Shared& shared_;
    io_uring ring_{};
    unsigned flags_ = 0;
    int wake_fd_ = -1;
    std::uint64_t wake_count_ = 0;
    bool listening_ = false;
    bool closing_ = false;

    std::deque<Batch::Item> waiting_;
    std::vector<Flight> flights_;
    std::vector<unsigned> free_;
    std::deque<Landed> landed_;
    std::vector<const std::uint8_t*> payload_;

    std::vector<Registered> memory_;
    std::vector<int> free_buffers_;
    std::unordered_map<std::uint64_t, int> files_;
    std::vector<int> free_files_;
};

}  // namespace hicache::io
