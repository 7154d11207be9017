// Pages of a region: in, out, gone, and those that go next.
#include <algorithm>

#include "checksum/copy.hpp"
#include "memory/region.hpp"

namespace hicache::memory {
namespace {

constexpr std::uint64_t kChunk = 65536;
/// Pages from here on leave the caches to what is used sooner: who reads them next is a device, or a process much later.
constexpr std::uint64_t kStreamed = 256 << 10;

std::vector<std::uint8_t>& scratch(std::uint64_t size) {
    static thread_local std::vector<std::uint8_t> memory;
    if (memory.size() < size) memory.resize(size);
    return memory;
}

}  // namespace

bool Region::has(const Identity& page, bool used) noexcept {
    const auto found = find(page);
    if (found && used) touch(*found);
    return found.has_value();
}

Verdict Region::read(const io::SlotShape& shape, const Identity& page, std::span<std::uint8_t* const> buffers,
                     bool used) {
    const auto found = find(page);
    if (!found) return Verdict::kAbsent;
    const bool stream = shape.payload_bytes() >= kStreamed;
    auto& header = scratch(shape.header_bytes);
    bool good = header_of(shape, page, *found, header.data());
    const std::uint8_t* sum = header.data() + io::checksums_at(shape);
    const std::uint8_t* from = found->slot + shape.header_bytes;
    for (std::size_t i = 0; good && i < buffers.size(); ++i)
        for (std::uint64_t at = 0; good && at < shape.lengths[i]; at += kChunk) {
            const std::uint64_t take = std::min(kChunk, shape.lengths[i] - at);
            good = checksum::copy(buffers[i] + at, from, take, stream) == load<std::uint32_t>(sum);
            from += take;
            sum += 4;
        }
    return judge(*found, good, used);
}

/// Copies a slot's header out; whether it is this page's, and the slot has room for such a page.
bool Region::header_of(const io::SlotShape& shape, const Identity& page, const Found& found,
                       std::uint8_t* header) noexcept {
    if (found.place.unit * kUnit + shape.header_bytes + shape.payload_bytes() > extent_bytes_) return false;
    read_slot(header, found.slot, shape.header_bytes);
    return io::verify_header(shape, page.data() + 16, header) == io::Verdict::kValid;
}

/// Of a page whose bytes have all been read: `good` counts only where its slot was its own until now.
Verdict Region::judge(const Found& found, bool good, bool used) noexcept {
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!current(found.place)) {
        ++changed_;
        return Verdict::kChanged;
    }
    if (!good) {
        ++damaged_;
        take_out(found);
        return Verdict::kDamaged;
    }
    if (used) touch(found);
    return Verdict::kValid;
}

Verdict Region::write(const io::SlotShape& shape, const Identity& page, const std::uint8_t* header,
                      std::span<const std::uint8_t* const> buffers) {
    if (const auto found = find(page)) {
        touch(*found);
        return Verdict::kPresent;
    }
    const std::uint64_t bytes = shape.header_bytes + shape.payload_bytes();
    const bool stream = shape.payload_bytes() >= kStreamed;
    const auto place = allocate((bytes + kUnit - 1) / kUnit);
    if (!place) return Verdict::kNoRoom;
    auto& sealed = scratch(shape.header_bytes);
    std::memcpy(sealed.data(), header, shape.header_bytes);
    std::uint8_t* sum = sealed.data() + io::checksums_at(shape);
    std::uint8_t* to = at(*place) + shape.header_bytes;
    for (std::size_t i = 0; i < buffers.size(); ++i)
        for (std::uint64_t at = 0; at < shape.lengths[i]; at += kChunk) {
            const std::uint64_t take = std::min(kChunk, shape.lengths[i] - at);
            const std::uint32_t crc = checksum::copy(to, buffers[i] + at, take, stream);
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
                    gone += take_out(Found{word, word_for(page, place), place, at(place)});
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

}  // namespace hicache::memory
