// Pages by place: the extents of each folder, and what in them is past its time.
#include <algorithm>
#include <limits>

#include "index/index.hpp"

namespace hicache::index {

std::uint32_t Index::known_place(std::uint32_t folder, std::uint32_t extent) const {
    if (last_place_ != NONE && places_[last_place_].folder == folder && places_[last_place_].extent == extent)
        return last_place_;
    const auto found = place_numbers_.find({folder, extent});
    if (found == place_numbers_.end()) return NONE;
    return last_place_ = found->second;
}

std::uint32_t Index::place_number(std::uint32_t folder, std::uint32_t extent) {
    if (const std::uint32_t known = known_place(folder, extent); known != NONE) return known;
    const auto [found, fresh] = place_numbers_.try_emplace({folder, extent}, NONE);
    if (fresh) {
        if (free_places_.empty()) {
            found->second = static_cast<std::uint32_t>(places_.size());
            places_.emplace_back();
        } else {
            found->second = free_places_.back();
            free_places_.pop_back();
        }
        places_[found->second] = Place{folder, extent, 0, {}, NEVER, NEVER, NONE};
    }
    return found->second;
}

std::uint32_t Index::at(std::uint32_t folder, std::uint32_t extent, std::uint32_t slot) const {
    const std::uint32_t place = known_place(folder, extent);
    if (place == NONE) return NONE;
    const Numbers& slots = places_[place].slots;
    return slot < slots.size() ? slots[slot] : NONE;
}

Numbers Index::expired(const Digest& space, std::size_t limit, std::size_t examine) {
    const std::uint32_t number = known_space(space);
    if (number == NONE || spaces_[number]->expiry == 0) return {};
    Space& there = *spaces_[number];
    Numbers found;
    const auto first = there.swept_place;
    const std::uint32_t resume = there.swept_slot;
    auto at = place_numbers_.lower_bound(first);
    for (std::size_t left = place_numbers_.size(); left != 0; --left, ++at) {
        if (at == place_numbers_.end()) at = place_numbers_.begin();
        Place& place = places_[at->second];
        const std::uint32_t start = at->first == first ? resume : 0;
        if (start == 0 && place.stored_from >= there.expiry) continue;
        if (found.size() >= limit || examine == 0) {
            there.swept_place = at->first;
            there.swept_slot = start;
            return found;
        }
        if (start == 0) {
            place.seen_by = number;
            place.seen_from = NEVER;
        }
        for (std::uint32_t slot = start; slot < place.slots.size(); ++slot) {
            const std::uint32_t n = place.slots[slot];
            if (n == NONE) continue;
            if (found.size() >= limit || examine == 0) {
                there.swept_place = at->first;
                there.swept_slot = slot;
                return found;
            }
            --examine;
            const Node& node = nodes_[n];
            place.see(node.seconds);
            if (node.has(OWN) && node.space == number && expired(n)) found.push_back(n);
        }
        if (place.seen_by == number) {
            place.stored_from = place.seen_from;
            place.seen_by = NONE;
        }
    }
    there.swept_place = {0, 0};
    there.swept_slot = 0;
    return found;
}

Numbers Index::in_extent(std::uint32_t folder, std::uint32_t extent) const {
    Numbers found;
    const auto place = place_numbers_.find({folder, extent});
    if (place != place_numbers_.end())
        for (const std::uint32_t n : places_[place->second].slots)
            if (n != NONE) found.push_back(n);
    return found;
}

Numbers Index::used_slots(std::uint32_t folder, std::uint32_t extent) const {
    Numbers found;
    const auto place = place_numbers_.find({folder, extent});
    if (place == place_numbers_.end()) return found;
    const Numbers& slots = places_[place->second].slots;
    for (std::uint32_t slot = 0; slot < slots.size(); ++slot)
        if (slots[slot] != NONE) found.push_back(slot);
    return found;
}

Numbers Index::in_folder(std::uint32_t folder) const {
    Numbers found;
    for (auto at = place_numbers_.lower_bound({folder, 0}); at != place_numbers_.end() && at->first.first == folder; ++at)
        for (const std::uint32_t n : places_[at->second].slots)
            if (n != NONE) found.push_back(n);
    return found;
}

Numbers Index::extents(std::uint32_t folder) const {
    Numbers found;
    for (auto at = place_numbers_.lower_bound({folder, 0}); at != place_numbers_.end() && at->first.first == folder; ++at)
        found.push_back(at->first.second);
    return found;
}

std::pair<std::int64_t, std::uint32_t> Index::last_used(std::uint32_t folder, std::uint32_t extent) const {
    std::pair<std::int64_t, std::uint32_t> last{std::numeric_limits<std::int64_t>::min(), 0};
    for (const std::uint32_t n : in_extent(folder, extent))
        if (nodes_[n].has(OWN)) last = std::max(last, std::pair(nodes_[n].rank, nodes_[n].tie));
    return last;
}

std::uint64_t Index::newest_generation(std::uint32_t folder, std::uint32_t extent) const {
    std::uint64_t newest = 0;
    for (const std::uint32_t n : in_extent(folder, extent)) newest = std::max(newest, nodes_[n].generation);
    return newest;
}

Snapshot Index::capture(bool one, std::uint32_t folder) const {
    Snapshot found{folder, {}};
    if (one) {
        std::size_t pages = 0;
        for (auto at = place_numbers_.lower_bound({folder, 0}); at != place_numbers_.end() && at->first.first == folder; ++at)
            pages += places_[at->second].pages;
        found.pages.reserve(pages);
    }
    // In the order of memory: by places each page would cost a miss of the cache.
    for (std::uint32_t n = 0; n < nodes_.end(); ++n) {
        const Node& node = nodes_[n];
        if (node.has(OWN) && (!one || places_[node.place].folder == folder))
            found.pages.push_back({node.rank, node.generation, node.tie, node.space, n});
    }
    return found;
}

void Snapshot::sort() {
    std::sort(pages.begin(), pages.end(), [](const Captured& a, const Captured& b) { return a.before(b); });
}

}  // namespace hicache::index
