// The table of a region: which page is where, and how many there are.
#include <algorithm>

#include "memory/region.hpp"

namespace hicache::memory {
namespace {

constexpr int kMostAncestors = 4096;

/// Where a page's words may be. Keys are hashes already; two namespaces must not put the same keys into the same buckets.
struct Hashed {
    std::uint64_t first, second;
    std::uint32_t tag;

    explicit Hashed(const Identity& page) noexcept {
        const auto space = load<std::uint64_t>(page.data()) * 0x9e3779b97f4a7c15u;
        first = load<std::uint64_t>(page.data() + 16) ^ space;
        second = load<std::uint64_t>(page.data() + 24) ^ (space >> 7);
        tag = load<std::uint32_t>(page.data() + 32) & 0xfffff;
        if (tag == 0) tag = 1;  // a word is never 0
    }
};

}  // namespace

Word Region::word_for(const Identity& page, const Place& place) noexcept { return pack(Hashed(page).tag, place); }

std::atomic<std::uint8_t>& Region::mark(const Place& place) noexcept {
    return marks_[std::uint64_t{place.extent} * units_ + place.unit];
}

std::uint8_t* Region::at(const Place& place) noexcept {
    return data_ + place.extent * extent_bytes_ + place.unit * kUnit;
}

bool Region::current(const Place& place) noexcept {
    const Control now{control(place.extent).load(std::memory_order_acquire)};
    return now.state() != State::kFree && now.generation() == place.generation;
}

std::optional<Place> Region::place_of(Word word) noexcept {
    const auto extent = static_cast<std::uint32_t>(word >> 14 & 0xffff), unit = static_cast<std::uint32_t>(word & 0x3fff);
    if (word == 0 || extent >= extents_count_ || unit >= units_) return {};
    const Control now{control(extent).load(std::memory_order_acquire)};
    if (now.state() == State::kFree || (now.generation() & 0x3fff) != (word >> 30 & 0x3fff)) return {};
    return Place{extent, unit, now.generation()};
}

std::atomic<Word>* Region::bucket(const Identity& page, unsigned which) noexcept {
    const Hashed hashed(page);
    return table_ + ((which == 0 ? hashed.first : hashed.second) & (buckets_ - 1)) * kBucket;
}

std::optional<Region::Found> Region::find(const Identity& page) noexcept {
    const std::uint32_t tag = Hashed(page).tag;
    for (unsigned which = 0; which < 2; ++which) {
        auto* words = bucket(page, which);
        for (unsigned i = 0; i < kBucket; ++i) {
            const Word word = words[i].load(std::memory_order_acquire);
            if (word >> 44 != tag) continue;
            const auto place = place_of(word);
            if (place && is_of(at(*place), page)) return Found{&words[i], word, *place, at(*place)};
        }
    }
    return {};
}

std::atomic<Word>* Region::word_of(const Identity& page, const Place& place) noexcept {
    const Word wanted = word_for(page, place);
    for (unsigned which = 0; which < 2; ++which)
        for (unsigned i = 0; i < kBucket; ++i)
            if (auto* word = bucket(page, which) + i; word->load(std::memory_order_acquire) == wanted) return word;
    return nullptr;
}

Verdict Region::publish(const Identity& page, const Place& place, std::uint64_t bytes) noexcept {
    const Word mine = word_for(page, place);
    count_in(place, bytes);
    for (int tries = 0; tries < kMostTries; ++tries) {
        std::atomic<Word>* chosen = nullptr;
        Word there = 0;
        unsigned most = 0;
        for (unsigned which = 0; which < 2; ++which) {
            auto* words = bucket(page, which);
            unsigned vacant = 0;
            for (unsigned i = 0; i < kBucket; ++i) {
                const Word word = words[i].load(std::memory_order_acquire);
                const auto other = place_of(word);
                if (!other) {
                    if (++vacant > most) chosen = &words[i], there = word, most = vacant;
                } else if (word >> 44 == mine >> 44 && is_of(at(*other), page)) {
                    count_out(place);
                    return Verdict::kPresent;  // another one was faster
                }
            }
        }
        if (chosen != nullptr) {
            if (chosen->compare_exchange_strong(there, mine)) return Verdict::kStored;
            continue;
        }
        // Both buckets are full, of slots much smaller than a table is made for: one page goes.
        auto* victim = bucket(page, 0) + mine % kBucket;
        there = victim->load();
        const auto gone = place_of(there);
        if (gone && victim->compare_exchange_strong(there, mine)) {
            count_out(*gone);
            ++displaced_;
            ++super_->changes;
            return Verdict::kStored;
        }
    }
    count_out(place);
    return Verdict::kNoRoom;
}

std::uint64_t Region::slot_bytes(const Place& place) noexcept {
    const std::uint64_t header = load<std::uint32_t>(at(place) + kHeaderBytesAt);
    const std::uint64_t payload = load<std::uint64_t>(at(place) + kPayloadAt);
    const std::uint64_t room = extent_bytes_ - place.unit * kUnit;
    return header > room || payload > room - header ? 0 : header + payload;
}

void Region::count_in(const Place& place, std::uint64_t bytes) noexcept {
    mark(place).store(static_cast<std::uint8_t>(Mark::kStored), std::memory_order_release);
    extents_[place.extent].pages.fetch_add(1, std::memory_order_relaxed);
    extents_[place.extent].bytes.fetch_add(static_cast<std::int64_t>(bytes), std::memory_order_relaxed);
}

void Region::count_out(const Place& place) noexcept {
    if (!current(place)) return;
    mark(place).store(static_cast<std::uint8_t>(Mark::kNone), std::memory_order_release);
    extents_[place.extent].pages.fetch_sub(1, std::memory_order_relaxed);
    extents_[place.extent].bytes.fetch_sub(static_cast<std::int64_t>(slot_bytes(place)), std::memory_order_relaxed);
}

bool Region::take_out(const Found& found) noexcept {
    Word word = found.word;
    if (!found.at->compare_exchange_strong(word, 0)) return false;
    count_out(found.place);
    ++super_->changes;
    return true;
}

void Region::touch(const Found& found) noexcept {
    Found here = found;
    for (int i = 0; i < kMostAncestors; ++i) {
        auto expected = static_cast<std::uint8_t>(Mark::kStored);
        // One that counts as used already had its ancestors touched then.
        if (!mark(here.place).compare_exchange_strong(expected, static_cast<std::uint8_t>(Mark::kUsed))) return;
        Identity parent = identity_of(here.slot);
        read_slot(parent.data() + 16, here.slot + kParentAt, 32);
        if (std::all_of(parent.begin() + 16, parent.end(), [](std::uint8_t byte) { return byte == 0; })) return;
        const auto next = find(parent);
        if (!next) return;
        here = *next;
    }
}

Counts Region::counts() const noexcept {
    Counts counts{};
    for (std::uint64_t i = 0; i < extents_count_; ++i) {
        if (Control{extents_[i].control.load(std::memory_order_relaxed)}.state() == State::kFree) {
            ++counts.free_extents;
            continue;
        }
        counts.pages += static_cast<std::uint64_t>(std::max<std::int64_t>(0, extents_[i].pages.load(std::memory_order_relaxed)));
        counts.bytes += static_cast<std::uint64_t>(std::max<std::int64_t>(0, extents_[i].bytes.load(std::memory_order_relaxed)));
    }
    counts.evicted = evicted_, counts.kept = kept_, counts.displaced = displaced_;
    counts.changed = changed_, counts.damaged = damaged_, counts.takeovers = takeovers_;
    return counts;
}

}  // namespace hicache::memory
