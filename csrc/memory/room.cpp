// Room in a region: extents are opened, filled, sealed, emptied, and taken over from processes that died.
#include <fcntl.h>

#include <algorithm>

#include "memory/region.hpp"

namespace hicache::memory {

std::optional<Place> Region::allocate(std::uint64_t units) {
    if (units > units_) return {};
    const std::lock_guard lock(mutex_);
    for (int tries = 0; tries < kMostTries; ++tries) {
        if (open_ && open_->next + units <= units_) {
            const Place place{open_->extent, static_cast<std::uint32_t>(open_->next), open_->generation};
            open_->next += units;
            ++open_->writing;
            return place;
        }
        if (open_) {
            if (open_->writing == 0)
                seal(*open_);
            else
                full_.push_back(*open_);
            open_.reset();
        }
        if (!open_another()) return {};
    }
    return {};
}

void Region::written(const Place& place) {
    const std::lock_guard lock(mutex_);
    if (open_ && open_->extent == place.extent) {
        --open_->writing;
        return;
    }
    for (std::size_t i = 0; i < full_.size(); ++i)
        if (full_[i].extent == place.extent && --full_[i].writing == 0) {
            seal(full_[i]);
            full_.erase(full_.begin() + static_cast<std::ptrdiff_t>(i));
            return;
        }
}

void Region::seal(const Open& open) noexcept {
    extents_[open.extent].sequence = ++super_->sequence;
    extents_[open.extent].born = ++super_->seals;
    control(open.extent).store(Control::of(State::kSealed, 0, open.generation).word, std::memory_order_release);
}

void Region::retire() {
    const std::lock_guard lock(mutex_);
    if (open_ && open_->writing == 0) {
        seal(*open_);
        open_.reset();
    }
}

bool Region::open_another() {
    std::uint64_t left = 0;
    auto extent = free_extent(left);
    if (extent && !supply_.take(*extent)) {
        const Control now{control(*extent).load()};
        control(*extent).store(Control::of(State::kFree, 0, now.generation()).word);
        extent.reset();
        left = 1;
    }
    if (!extent) {
        take_over_from_the_dead();
        extent = empty_oldest(false);
        if (!extent) return false;
    }
    open_ = Open{*extent, Control{control(*extent).load()}.generation()};
    opened_.fetch_add(1, std::memory_order_relaxed);
    // One extent is kept free, so that pages can be moved on before their own is emptied.
    if (left == 0) {
        take_over_from_the_dead();
        empty_oldest(true);
    }
    return true;
}

/// One whose memory is there, if any is.
std::optional<std::uint32_t> Region::free_extent(std::uint64_t& left) noexcept {
    std::optional<std::uint32_t> mine;
    for (const bool ready : {true, false}) {
        left = 0;
        for (std::uint32_t i = 0; i < extents_count_; ++i) {
            Word word = control(i).load(std::memory_order_acquire);
            const Control now{word};
            if (now.state() != State::kFree) continue;
            if (mine || supply_.ready(i) != ready)
                ++left;
            else if (control(i).compare_exchange_strong(word, Control::of(State::kOpen, owner_, now.generation()).word))
                mine = i;
        }
        if (mine) break;
    }
    return mine;
}

bool Region::prepare(std::uint64_t ahead, std::uint64_t step) noexcept {
    std::uint64_t there = 0;
    std::optional<std::uint32_t> next;
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        if (Control{control(i).load(std::memory_order_acquire)}.state() != State::kFree) continue;
        if (supply_.ready(i))
            there += extent_bytes_;
        else if (!next)
            next = i;
    }
    return next && there < ahead && supply_.take_some(*next, step);
}

/// Who has the lowest goes first. New pages have a quarter of the region to be used in, whatever else is in use.
std::uint64_t Region::turn_of(std::uint32_t extent) const noexcept {
    const Extent& is = extents_[extent];
    if (is.pages.load(std::memory_order_relaxed) <= 0) return 0;
    const bool young = is.born + extents_count_ / kYouth > super_->seals;
    return is.sequence | std::uint64_t{young} << 63;
}

std::optional<std::uint32_t> Region::claim_oldest() noexcept {
    for (int tries = 0; tries < kMostTries; ++tries) {
        std::optional<std::uint32_t> chosen;
        std::uint64_t oldest = 0;
        Word word = 0;
        for (std::uint32_t i = 0; i < extents_count_; ++i) {
            const Word now = control(i).load(std::memory_order_acquire);
            if (Control{now}.state() != State::kSealed) continue;
            const std::uint64_t age = turn_of(i);
            if (!chosen || age < oldest) chosen = i, oldest = age, word = now;
        }
        if (!chosen) return {};
        if (control(*chosen).compare_exchange_strong(
                word, Control::of(State::kClaimed, owner_, Control{word}.generation()).word))
            return chosen;
    }
    return {};
}

/// Free where pages were kept, else open and this process's.
std::optional<std::uint32_t> Region::empty_oldest(bool keep) {
    auto extent = claim_oldest();
    // Where most of it is in use it stays as it is, and is the youngest again: cheaper than to move its pages.
    // As often as there are extents, so that where all are in use the oldest goes after all.
    for (std::uint64_t chances = extents_count_; extent && chances > 0 && spared(*extent); --chances)
        extent = claim_oldest();
    if (!extent) return {};
    const std::uint64_t generation = Control{control(*extent).load()}.generation();
    if (keep) keep_used(*extent, generation);
    // From here on nobody finds what is left in it. Marks go before anybody else can open it.
    control(*extent).store(Control::of(State::kClaimed, owner_, generation + 1).word);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    std::uint64_t gone = 0;
    each_slot(*extent, generation + 1, 0, [&](const Place& place, Mark) {
        mark(place).store(static_cast<std::uint8_t>(Mark::kNone), std::memory_order_relaxed);
        ++gone;
        return true;
    });
    evicted_ += gone;
    extents_[*extent].pages = 0;
    extents_[*extent].bytes = 0;
    super_->changes += 1;
    control(*extent).store(Control::of(keep ? State::kFree : State::kOpen, keep ? 0 : owner_, generation + 1).word);
    return extent;
}

/// Whether more than half of a claimed extent was used: then it is sealed again, as the youngest, and its pages must be
/// used anew to be spared again.
bool Region::spared(std::uint32_t extent) {
    const std::uint64_t generation = Control{control(extent).load()}.generation();
    std::uint64_t bytes = 0;
    each_slot(extent, generation, 0, [&](const Place& place, Mark is) {
        if (is == Mark::kUsed) bytes += slot_bytes(place);
        return true;
    });
    if (bytes <= extent_bytes_ / 2) return false;
    each_slot(extent, generation, 0, [&](const Place& place, Mark is) {
        if (is == Mark::kUsed) {
            mark(place).store(static_cast<std::uint8_t>(Mark::kStored), std::memory_order_relaxed);
            ++kept_;
        }
        return true;
    });
    extents_[extent].sequence = ++super_->sequence;
    control(extent).store(Control::of(State::kSealed, 0, generation).word);
    return true;
}

void Region::keep_used(std::uint32_t extent, std::uint64_t generation) {
    each_slot(extent, generation, 0, [&](const Place& from, Mark is) {
        if (is != Mark::kUsed) return true;
        const std::uint64_t bytes = slot_bytes(from), units = (bytes + kUnit - 1) / kUnit;
        const Identity page = identity_of(at(from));
        auto* word = word_of(page, from);
        if (bytes == 0 || word == nullptr) return true;
        if (open_->next + units > units_ / 2) return false;  // what was opened is for new pages
        const Place to{open_->extent, static_cast<std::uint32_t>(open_->next), open_->generation};
        std::memcpy(at(to), at(from), bytes);
        open_->next += units;
        count_in(to, bytes);
        Word old = word_for(page, from);
        if (word->compare_exchange_strong(old, word_for(page, to))) {
            mark(from).store(static_cast<std::uint8_t>(Mark::kNone), std::memory_order_relaxed);
            ++kept_;
        } else {
            count_out(to);
        }
        return true;
    });
}

void Region::take_over_from_the_dead() noexcept {
    std::array<std::int8_t, kMostOwners> known{};
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        Word word = control(i).load(std::memory_order_acquire);
        const Control now{word};
        if (now.state() != State::kOpen && now.state() != State::kClaimed) continue;
        if (now.owner() == owner_ || now.owner() >= kMostOwners) continue;
        auto& lives = known[now.owner()];
        if (lives == 0) lives = alive(now.owner()) ? 1 : -1;
        if (lives < 0) extents_[i].sequence = ++super_->sequence;
        if (lives < 0 && control(i).compare_exchange_strong(word, Control::of(State::kSealed, 0, now.generation()).word))
            ++takeovers_;
    }
}

bool Region::alive(unsigned owner) const noexcept {
    if (lock_fd_ < 0) return false;
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = owner;
    lock.l_len = 1;
    // What cannot be asked counts as alive: its extent is not ours to take.
    return fcntl(lock_fd_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace hicache::memory
