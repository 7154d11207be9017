#include "memory/region.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "checksum/crc32c.hpp"

namespace hicache::memory {
namespace {

constexpr std::uint64_t kChunk = 65536;
// Copied and checksummed in pieces that the first-level cache holds, so that memory is passed once.
constexpr std::uint64_t kPiece = 16384;
constexpr std::uint32_t kPageFormat = 1;
constexpr int kMostTries = 16;
constexpr int kMostAncestors = 4096;
// Of a slot's header: storage_backends/format.py has the diagram.
constexpr std::size_t kHeaderBytesAt = 12, kNamespaceAt = 16, kParentAt = 64, kPayloadAt = 112;

template <typename T>
T load(const std::uint8_t* at) noexcept {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

Identity identity_of(const std::uint8_t* slot) noexcept {
    Identity page;
    std::memcpy(page.data(), slot + kNamespaceAt, page.size());
    return page;
}

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

std::uint32_t copy_chunk(std::uint8_t* to, const std::uint8_t* from, std::uint64_t length) noexcept {
    const auto crc = checksum::active().function;
    std::uint32_t sum = 0;
    for (std::uint64_t at = 0; at < length; at += kPiece) {
        const std::uint64_t take = std::min(kPiece, length - at);
        std::memcpy(to + at, from + at, take);
        sum = crc(to + at, take, sum);  // of the copy: what is stored, or given, is what was checked
    }
    return sum;
}

std::vector<std::uint8_t>& scratch(std::uint64_t size) {
    static thread_local std::vector<std::uint8_t> memory;
    if (memory.size() < size) memory.resize(size);
    return memory;
}

}  // namespace

void Region::format(std::uint8_t* base, const Geometry& g) noexcept {
    auto* super = new (base) Superblock{};
    std::memcpy(super->magic, kMagic, sizeof kMagic);
    super->version = kVersion;
    super->page_format = kPageFormat;
    super->file_bytes = g.file_bytes;
    super->extent_bytes = g.extent_bytes;
    super->extents = g.extents;
    super->buckets = g.buckets;
    super->extents_at = g.extents_at;
    super->table_at = g.table_at;
    super->marks_at = g.marks_at;
    super->data_at = g.data_at;
    auto* extents = reinterpret_cast<Extent*>(base + g.extents_at);
    for (std::uint64_t i = 0; i < g.extents; ++i) extents[i].control = Control::of(State::kFree, 0, 1).word;
}

std::string Region::problem(const std::uint8_t* base, std::uint64_t length) {
    if (length < kUnit) return "too short";
    const auto* super = reinterpret_cast<const Superblock*>(base);
    if (std::memcmp(super->magic, kMagic, sizeof kMagic) != 0) return "not a region";
    if (super->version != kVersion) return "format " + std::to_string(super->version);
    if (super->page_format != kPageFormat) return "page format " + std::to_string(super->page_format);
    const Geometry g = Geometry::of(super->extent_bytes * super->extents);
    const bool same = super->extents != 0 && super->extents <= kMostExtents && super->extent_bytes <= kMaxExtent &&
                      g.extents == super->extents && g.extent_bytes == super->extent_bytes &&
                      g.buckets == super->buckets && g.extents_at == super->extents_at &&
                      g.table_at == super->table_at && g.marks_at == super->marks_at && g.data_at == super->data_at &&
                      g.file_bytes == super->file_bytes;
    if (!same) return "another geometry";
    return g.file_bytes == length ? "" : "another length";
}

Region::Region(std::uint8_t* base, int memory_fd, int lock_fd, unsigned owner)
    : base_(base),
      super_(reinterpret_cast<Superblock*>(base)),
      extent_bytes_(super_->extent_bytes),
      extents_count_(super_->extents),
      units_(extent_bytes_ / kUnit),
      buckets_(super_->buckets),
      extents_(reinterpret_cast<Extent*>(base + super_->extents_at)),
      table_(reinterpret_cast<std::atomic<Word>*>(base + super_->table_at)),
      marks_(reinterpret_cast<std::atomic<std::uint8_t>*>(base + super_->marks_at)),
      data_(base + super_->data_at),
      memory_fd_(memory_fd),
      lock_fd_(lock_fd),
      owner_(owner),
      allocated_(extents_count_) {
    // Whoever had this number before is dead, or this process would not have it.
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        Word word = control(i).load();
        const Control now{word};
        if ((now.state() == State::kOpen || now.state() == State::kClaimed) && now.owner() == owner_)
            control(i).compare_exchange_strong(word, Control::of(State::kSealed, 0, now.generation()).word);
    }
}

// ---- places and words

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
            if (place && std::memcmp(at(*place) + kNamespaceAt, page.data(), page.size()) == 0)
                return Found{&words[i], word, *place, at(*place)};
        }
    }
    return {};
}

std::atomic<Word>* Region::word_of(const Identity& page, const Place& place) noexcept {
    const Word wanted = pack(Hashed(page).tag, place);
    for (unsigned which = 0; which < 2; ++which)
        for (unsigned i = 0; i < kBucket; ++i)
            if (auto* word = bucket(page, which) + i; word->load(std::memory_order_acquire) == wanted) return word;
    return nullptr;
}

Verdict Region::publish(const Identity& page, const Place& place, std::uint64_t bytes) noexcept {
    const Word mine = pack(Hashed(page).tag, place);
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
                } else if (word >> 44 == mine >> 44 &&
                           std::memcmp(at(*other) + kNamespaceAt, page.data(), page.size()) == 0) {
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
        std::memcpy(parent.data() + 16, here.slot + kParentAt, 32);
        if (std::all_of(parent.begin() + 16, parent.end(), [](std::uint8_t byte) { return byte == 0; })) return;
        const auto next = find(parent);
        if (!next) return;
        here = *next;
    }
}

template <typename Each>
void Region::each_slot(std::uint32_t extent, std::uint64_t generation, std::uint64_t from, Each each) {
    const auto* marks = reinterpret_cast<const std::uint8_t*>(marks_ + std::uint64_t{extent} * units_);
    for (std::uint64_t unit = from; unit < units_; ++unit) {
        while (unit % 8 == 0 && unit + 8 <= units_ && load<std::uint64_t>(marks + unit) == 0) unit += 8;
        if (unit >= units_) return;
        const Place place{extent, static_cast<std::uint32_t>(unit), generation};
        if (const auto is = static_cast<Mark>(mark(place).load(std::memory_order_acquire)); is != Mark::kNone)
            if (!each(place, is)) return;
    }
}

// ---- pages

bool Region::has(const Identity& page, bool used) noexcept {
    const auto found = find(page);
    if (found && used) touch(*found);
    return found.has_value();
}

Verdict Region::read(const io::SlotShape& shape, const Identity& page, std::span<std::uint8_t* const> buffers,
                     bool used) {
    const auto found = find(page);
    if (!found) return Verdict::kAbsent;
    bool good = found->place.unit * kUnit + shape.header_bytes + shape.payload_bytes() <= extent_bytes_;
    if (good) {
        auto& header = scratch(shape.header_bytes);
        std::memcpy(header.data(), found->slot, shape.header_bytes);
        good = io::verify_header(shape, page.data() + 16, header.data()) == io::Verdict::kValid;
        const std::uint8_t* sum = header.data() + io::checksums_at(shape);
        const std::uint8_t* from = found->slot + shape.header_bytes;
        for (std::size_t i = 0; good && i < buffers.size(); ++i)
            for (std::uint64_t at = 0; good && at < shape.lengths[i]; at += kChunk) {
                const std::uint64_t take = std::min(kChunk, shape.lengths[i] - at);
                good = copy_chunk(buffers[i] + at, from, take) == load<std::uint32_t>(sum);
                from += take;
                sum += 4;
            }
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!current(found->place)) {
        ++changed_;
        return Verdict::kChanged;
    }
    if (!good) {
        ++damaged_;
        take_out(*found);
        return Verdict::kDamaged;
    }
    if (used) touch(*found);
    return Verdict::kValid;
}

Verdict Region::write(const io::SlotShape& shape, const Identity& page, const std::uint8_t* header,
                      std::span<const std::uint8_t* const> buffers) {
    if (const auto found = find(page)) {
        touch(*found);
        return Verdict::kPresent;
    }
    const std::uint64_t bytes = shape.header_bytes + shape.payload_bytes();
    const auto place = allocate((bytes + kUnit - 1) / kUnit);
    if (!place) return Verdict::kNoRoom;
    auto& sealed = scratch(shape.header_bytes);
    std::memcpy(sealed.data(), header, shape.header_bytes);
    std::uint8_t* sum = sealed.data() + io::checksums_at(shape);
    std::uint8_t* to = at(*place) + shape.header_bytes;
    for (std::size_t i = 0; i < buffers.size(); ++i)
        for (std::uint64_t at = 0; at < shape.lengths[i]; at += kChunk) {
            const std::uint64_t take = std::min(kChunk, shape.lengths[i] - at);
            const std::uint32_t crc = copy_chunk(to, buffers[i] + at, take);
            std::memcpy(sum, &crc, sizeof crc);
            to += take;
            sum += 4;
        }
    io::seal_header(shape, sealed.data());
    std::memcpy(at(*place), sealed.data(), shape.header_bytes);
    const Verdict verdict = publish(page, *place, bytes);
    written(*place);
    return verdict;
}

bool Region::remove(const Identity& page) noexcept {
    bool was = false;
    // Two processes may have stored a page at the same moment, each its own.
    while (const auto found = find(page)) was = take_out(*found) || was;
    return was;
}

std::uint64_t Region::clear(const std::uint8_t* name_space) {
    std::uint64_t gone = 0;
    for (std::uint32_t extent = 0; extent < extents_count_; ++extent) {
        const Control now{control(extent).load(std::memory_order_acquire)};
        if (now.state() == State::kFree) continue;
        each_slot(extent, now.generation(), 0, [&](const Place& place, Mark) {
            const Identity page = identity_of(at(place));
            if (std::memcmp(page.data(), name_space, 16) == 0)
                if (auto* word = word_of(page, place))
                    gone += take_out(Found{word, pack(Hashed(page).tag, place), place, at(place)});
            return true;
        });
    }
    return gone;
}

std::vector<Identity> Region::going(std::size_t most) {
    std::vector<std::pair<std::uint64_t, std::uint32_t>> sealed;
    std::uint64_t free = 0;
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        const Control now{control(i).load(std::memory_order_acquire)};
        if (now.state() == State::kSealed) sealed.emplace_back(turn_of(i), i);
        free += now.state() == State::kFree;
    }
    // One free extent is not room for more: it is where the next one to be opened comes from.
    const std::uint64_t wanted = (extents_count_ + 9) / 10 + 1;
    std::sort(sealed.begin(), sealed.end());
    sealed.resize(std::min<std::size_t>(sealed.size(), free < wanted ? wanted - free : 0));
    std::vector<Identity> pages;
    const std::lock_guard lock(mutex_);
    for (const auto& [sequence, extent] : sealed) {
        if (sequence < going_sequence_) continue;
        const std::uint64_t from = sequence == going_sequence_ ? going_unit_ : 0;
        const Control now{control(extent).load(std::memory_order_acquire)};
        bool enough = false;
        each_slot(extent, now.generation(), from, [&](const Place& place, Mark) {
            if (pages.size() == most) {
                going_sequence_ = sequence, going_unit_ = place.unit;
                enough = true;
                return false;
            }
            const Identity page = identity_of(at(place));
            if (word_of(page, place) != nullptr) pages.push_back(page);
            return true;
        });
        if (enough) return pages;
    }
    going_sequence_ = going_unit_ = 0;
    return pages;
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

// ---- room

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
    if (extent && !allocate_memory(*extent)) {
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
    // One extent is kept free, so that pages can be moved on before their own is emptied.
    if (left == 0) {
        take_over_from_the_dead();
        empty_oldest(true);
    }
    return true;
}

std::optional<std::uint32_t> Region::free_extent(std::uint64_t& left) noexcept {
    std::optional<std::uint32_t> mine;
    left = 0;
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        Word word = control(i).load(std::memory_order_acquire);
        const Control now{word};
        if (now.state() != State::kFree) continue;
        if (mine)
            ++left;
        else if (control(i).compare_exchange_strong(word, Control::of(State::kOpen, owner_, now.generation()).word))
            mine = i;
    }
    return mine;
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
        Word old = pack(Hashed(page).tag, from);
        if (word->compare_exchange_strong(old, pack(Hashed(page).tag, to))) {
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

/// Pages that the kernel has not given yet would end the process (SIGBUS) where it has none left; here they are refused.
bool Region::allocate_memory(std::uint32_t extent) noexcept {
    if (memory_fd_ < 0 || allocated_[extent]) return true;
    const auto from = static_cast<off_t>(data_ - base_ + extent * extent_bytes_);
    while (fallocate(memory_fd_, 0, from, static_cast<off_t>(extent_bytes_)) != 0)
        if (errno != EINTR) return false;
#ifdef MADV_POPULATE_WRITE
    madvise(data_ + extent * extent_bytes_, extent_bytes_, MADV_POPULATE_WRITE);
#endif
    allocated_[extent] = true;
    return true;
}

}  // namespace hicache::memory
