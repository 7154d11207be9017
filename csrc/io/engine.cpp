#include "io/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <future>

#include "io/ring.hpp"

namespace hicache::io {
namespace {

// Ends are handed over in groups, since whoever takes them pays for a lock and a thread switch each time. A group is
// due when it is this large, when it has the last page of a batch, or when its first end has waited this long.
constexpr std::size_t kGroup = 64;
constexpr auto kGroupWait = std::chrono::milliseconds(10);
constexpr auto kRegisterWait = std::chrono::seconds(60);

std::chrono::steady_clock::time_point after(double seconds) {
    return std::chrono::steady_clock::now() +
           std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

Shared::Shared(const Options& given) : options(given) {}

Shared::~Shared() = default;

bool Shared::submit(const std::shared_ptr<Batch>& batch) {
    const std::size_t pages = batch->pages.size();
    const std::scoped_lock lock(mutex_);
    if (closed_) return false;
    if (pages == 0) return true;
    batch->open = static_cast<std::uint32_t>(pages);
    unfinished_ += pages;
    queued_pages_ += pages;
    queue_.push_back({batch, 0});
    // A second ring is worth waking only for pages that the first will not get to soon.
    std::size_t wanted = std::max<std::size_t>(1, pages / 4);
    for (const auto& ring : rings) {
        if (wanted == 0) break;
        if (!ring->asleep || !ring->hungry) continue;
        ring->wake();
        --wanted;
    }
    return true;
}

Shared::Work Shared::take(Ring& ring, std::size_t room, std::deque<Batch::Item>& out, bool idle) {
    Work work;
    const std::scoped_lock lock(mutex_);
    ring.asleep = false;
    work.stop = closed_;
    work.controls.swap(ring.controls);
    if (room != 0 && queued_pages_ != 0) {
        const Queued& first = queue_.front();
        // Writes are checksummed one by one before they leave: what one ring takes, the other cannot help with.
        const bool seals = first.batch->slots && first.batch->pages[first.next].write;
        std::size_t share = seals ? 2 : std::max<std::size_t>(4, (queued_pages_ + rings.size() - 1) / rings.size());
        for (share = std::min(share, room); share != 0 && !queue_.empty(); --share) {
            Queued& from = queue_.front();
            out.push_back({from.batch, from.next++});
            --queued_pages_;
            if (from.next == from.batch->pages.size()) queue_.pop_front();
        }
    } else if (idle && work.controls.empty() && !closed_) {
        ring.asleep = true;
        ring.hungry = room != 0;
    }
    return work;
}

void Shared::post(Batch& batch, std::uint32_t page, std::int64_t moved, Verdict verdict) {
    const std::scoped_lock lock(mutex_);
    post_locked(batch, page, moved, verdict);
}

void Shared::post_locked(Batch& batch, std::uint32_t page, std::int64_t moved, Verdict verdict) {
    ends_.push_back({batch.token, moved, page, verdict});
    const bool due = --batch.open == 0 || ends_.size() >= kGroup;
    // The first one wakes the reader too, so that it minds the time.
    if ((due && !ends_due_) || ends_.size() == 1) ends_changed_.notify_one();
    ends_due_ = ends_due_ || due;
    if (--unfinished_ == 0) quiet_.notify_all();
}

std::vector<Ended> Shared::reap() {
    std::vector<Ended> taken;
    std::unique_lock lock(mutex_);
    ends_changed_.wait(lock, [&] { return !ends_.empty() || !reaping_; });
    ends_changed_.wait_for(lock, kGroupWait, [&] { return ends_due_ || !reaping_; });
    ends_due_ = false;
    taken.swap(ends_);
    return taken;
}

void Shared::stop_reaping() {
    const std::scoped_lock lock(mutex_);
    reaping_ = false;
    ends_changed_.notify_all();
}

bool Shared::control(const std::function<void(Ring&)>& call) {
    const std::scoped_lock lock(mutex_);
    if (closed_) return false;
    for (const auto& ring : rings) {
        ring->controls.push_back(call);
        if (ring->asleep) ring->wake();
    }
    return true;
}

bool Shared::close(double seconds) {
    const auto until = after(seconds);
    std::unique_lock lock(mutex_);
    closed_ = true;
    for (; !queue_.empty(); queue_.pop_front()) {
        Queued& waiting = queue_.front();
        while (waiting.next < waiting.batch->pages.size())
            post_locked(*waiting.batch, waiting.next++, -ECANCELED, Verdict::kUnchecked);
    }
    queued_pages_ = 0;
    for (const auto& ring : rings)
        if (ring->asleep) ring->wake();
    return quiet_.wait_until(lock, until, [&] { return unfinished_ == 0; });
}

Engine::Engine(const Options& options) : shared_(std::make_shared<Shared>(options)), pid_(getpid()) {
    for (unsigned i = 0; i < options.threads; ++i) shared_->rings.push_back(std::make_unique<Ring>(*shared_));
    for (unsigned i = 0; i < options.threads; ++i) {
        threads_.emplace_back([shared = shared_, i] { shared->rings[i]->run(); });
        pthread_setname_np(threads_.back().native_handle(), ("hicache-ring-" + std::to_string(i)).c_str());
    }
}

Engine::~Engine() {
    if (getpid() != pid_) {
        // A forked child has none of the threads and must not touch their rings: let go of nothing.
        new std::vector<std::thread>(std::move(threads_));
        new std::shared_ptr<Shared>(shared_);
        return;
    }
    const bool quiet = shared_->close(0);
    shared_->stop_reaping();
    for (auto& thread : threads_) {
        if (quiet)
            thread.join();
        else
            thread.detach();  // it keeps what it shares alive until the device answers
    }
}

std::string Engine::register_memory(std::uint64_t address, std::uint64_t length) {
    if (length == 0) return "";
    struct Answers {
        std::mutex mutex;
        std::condition_variable changed;
        std::size_t open = 0;
        int error = 0;
    };
    const auto answers = std::make_shared<Answers>();
    answers->open = shared_->rings.size();
    const bool taken = shared_->control([answers, address, length](Ring& ring) {
        const int error = ring.register_memory(address, length);
        const std::scoped_lock lock(answers->mutex);
        if (error != 0) answers->error = error;
        --answers->open;
        answers->changed.notify_all();
    });
    if (!taken) return "the engine is closed";
    std::unique_lock lock(answers->mutex);
    if (!answers->changed.wait_for(lock, kRegisterWait, [&] { return answers->open == 0; }))
        return "the kernel takes its time";
    switch (answers->error) {
        case 0: return "";
        case ENOMEM: return "the limit of locked memory (ulimit -l) is too low";
        case ENOSPC: return "this kernel has no table for it, or the table is full";
        default: return std::strerror(answers->error);
    }
}

void Engine::retain(const std::vector<std::uint64_t>& files) {
    shared_->control([files](Ring& ring) { ring.retain(files); });
}

std::uint64_t Engine::registered_bytes() const { return shared_->rings.front()->registered_bytes; }

std::string Engine::description() const {
    const unsigned flags = shared_->rings.front()->setup_flags();
    std::string text = std::to_string(shared_->rings.size()) + (shared_->rings.size() == 1 ? " ring" : " rings");
    if (flags & IORING_SETUP_DEFER_TASKRUN) text += ", deferred task work";
    if (flags & IORING_SETUP_SQPOLL) text += ", SQPOLL";
    if (flags & IORING_SETUP_IOPOLL) text += ", IOPOLL";
    return text;
}

}  // namespace hicache::io
