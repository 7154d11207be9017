// Threads that copy parts of one large batch side by side, so that a caller who holds a lock of its own (Python's) has
// to come back for it once a batch and not once a part.
//
// They are made for a batch and gone when it is done: nothing lives on into a fork, or waits. Over all batches at work no
// more run than the owner of a Helpers allows, callers included; a batch that finds none free is done by its caller.
//
// Belongs here: how many, and what one throws. Does not belong here: what is copied.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace hicache::memory {

class Helpers {
  public:
    /// most: threads at work at the same time, callers included, who are never made to wait.
    explicit Helpers(unsigned most) : free_(static_cast<int>(most)) {}

    /// Calls each(i) once for every i below count, on this thread and at most `wanted` others, and returns when all are
    /// done. What one of them throws is thrown here; others that had not begun are left out then.
    template <typename Each>
    void run(std::size_t count, std::size_t wanted, const Each& each) {
        free_.fetch_sub(1, std::memory_order_relaxed);
        std::atomic<std::size_t> next{0};
        std::atomic<bool> failed{false};
        std::exception_ptr thrown;
        const auto work = [&]() noexcept {
            for (std::size_t i; !failed.load(std::memory_order_relaxed) &&
                                (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
                try {
                    each(i);
                } catch (...) {
                    if (!failed.exchange(true)) thrown = std::current_exception();
                }
            }
        };
        std::vector<std::thread> threads;
        unsigned claimed = 0;
        try {
            threads.reserve(std::min(wanted, count));
            while (threads.size() + 1 < count && threads.size() < wanted && claim()) {
                ++claimed;
                threads.emplace_back(work);
            }
        } catch (const std::exception&) {
            // No memory or no thread to be had: those that there are do it.
        }
        work();
        for (auto& thread : threads) thread.join();
        free_.fetch_add(static_cast<int>(claimed) + 1, std::memory_order_relaxed);
        if (thrown) std::rethrow_exception(thrown);
    }

    /// Threads that could still be taken.
    int free() const noexcept { return free_.load(std::memory_order_relaxed); }

  private:
    bool claim() noexcept {
        int now = free_.load(std::memory_order_relaxed);
        while (now > 0)
            if (free_.compare_exchange_weak(now, now - 1, std::memory_order_relaxed)) return true;
        return false;
    }

    std::atomic<int> free_;
};

}  // namespace hicache::memory
