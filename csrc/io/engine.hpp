// The native I/O engine: one io_uring per thread, pages in, ends out. No Python, no torch.
//
// Belongs here: the queue between callers and rings, the way back, close. Does not belong here: what a ring does with
// a page (ring.hpp), or what a slot's bytes mean (slot.hpp).
//
//   caller --submit--> queue --take--> ring threads: begin, complete, checksum --post--> ends --reap--> one reader
//
// Checksums are computed by the ring's own thread, between looks at the ring: the device works on the other pages
// meanwhile, the page is warm, and there is no hand-over. More rings are more checksum threads; each takes from the
// common queue only what it has room for, so that a ring that checksums does not hold back pages that another could
// begin.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "io/batch.hpp"

namespace hicache::io {

/// This engine cannot work here; what() says why in one clause.
struct Unavailable : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// depth: pages in flight per ring.
struct Options {
    unsigned threads = 1;
    unsigned depth = 32;
    bool sqpoll = false;
    bool iopoll = false;
};

class Ring;

/// What callers and ring threads share. Ring threads hold it too: one that waits for a device that never answers
/// outlives the engine.
class Shared {
public:
    explicit Shared(const Options& given);
    ~Shared();

    const Options options;

    // Callers.
    /// False once closed: the batch is not taken.
    bool submit(const std::shared_ptr<Batch>& batch);
    /// Refuses batches from now on, ends what waits, asks the kernel to give up what is in flight; whether everything
    /// ended within these seconds.
    bool close(double seconds);
    /// Waits for ends, a good number of them at a time; empty: `stop_reaping` was called and there are none.
    std::vector<Ended> reap();
    void stop_reaping();
    /// Has each ring's thread run this, and returns at once; false: closed.
    bool control(const std::function<void(Ring&)>& call);

    // Ring threads.
    struct Work {
        bool stop = false;
        std::vector<std::function<void(Ring&)>> controls;
    };
    /// Moves at most `room` pages to `out`. idle: the ring sleeps until woken if it gets nothing.
    Work take(Ring& ring, std::size_t room, std::deque<Batch::Item>& out, bool idle);
    void post(Batch& batch, std::uint32_t page, std::int64_t moved, Verdict verdict);

    std::vector<std::unique_ptr<Ring>> rings;  // before any thread starts; then never changed

private:
    struct Queued {
        std::shared_ptr<Batch> batch;
        std::uint32_t next = 0;
    };
    void post_locked(Batch& batch, std::uint32_t page, std::int64_t moved, Verdict verdict);

    // One lock: what is done under it is short, and it is taken a few times per page.
    std::mutex mutex_;
    std::deque<Queued> queue_;
    std::size_t queued_pages_ = 0;
    std::size_t unfinished_ = 0;  // pages taken and not posted
    bool closed_ = false;
    std::condition_variable quiet_;

    std::condition_variable ends_changed_;
    std::vector<Ended> ends_;
    bool ends_due_ = false;
    bool reaping_ = true;
};

class Engine {
public:
    /// Throws Unavailable.
    explicit Engine(const Options& options);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    /// Every page's end comes out of `reap` exactly once; false: closed, and none will.
    bool submit(const std::shared_ptr<Batch>& batch) { return shared_->submit(batch); }
    std::vector<Ended> reap() { return shared_->reap(); }
    void stop_reaping() { shared_->stop_reaping(); }
    bool close(double seconds) { return shared_->close(seconds); }

    /// Registers memory with every ring, in pieces; what was registered there before is replaced. Empty, or why some
    /// of it could not be: it works all the same, by other requests. Waits for the rings to come round to it.
    std::string register_memory(std::uint64_t address, std::uint64_t length);
    /// Of the registered files, keep only these: the others' space comes back once they are deleted.
    void retain(const std::vector<std::uint64_t>& files);

    /// Bytes registered (with the first ring), and what the rings were set up with, for logs.
    std::uint64_t registered_bytes() const;
    std::string description() const;

private:
    std::shared_ptr<Shared> shared_;
    std::vector<std::thread> threads_;
    const int pid_;
};

}  // namespace hicache::io
