#include "index/index.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <tuple>

namespace hicache::index {

std::size_t Index::bytes() const {
    std::size_t total = nodes_.bytes() + table_.bytes() + (walk_.capacity() + protected_.capacity()) * 4;
    for (const Place& place : places_) total += sizeof(Place) + place.slots.capacity() * sizeof(std::uint32_t);
    for (const auto& space : spaces_) total += sizeof(Space) + space->order.bytes();
    return total + pins_.bytes();
}

// -- names -------------------------------------------------------------------------------------------------------

std::uint32_t Index::known_space(const Digest& digest) const {
    if (last_space_ != NONE && spaces_[last_space_]->digest == digest) return last_space_;
    const auto found = space_numbers_.find(digest);
    if (found == space_numbers_.end()) return NONE;
    return last_space_ = found->second;
}

std::uint32_t Index::space_number(const Digest& digest) {
    if (const std::uint32_t known = known_space(digest); known != NONE) return known;
    const auto [found, fresh] = space_numbers_.try_emplace(digest, static_cast<std::uint32_t>(spaces_.size()));
    if (found->second >= MOST_SPACES) throw std::length_error("the index is full");
    if (fresh) spaces_.push_back(std::make_unique<Space>(digest, policy_, nodes_));
    return found->second;
}

std::uint32_t Index::find(const Digest& space, const Key& key) const {
    const std::uint32_t number = known_space(space);
    if (number == NONE) return NONE;
    const std::uint32_t n = table_.find(Table::hash(number, key), number, key);
    return n != NONE && nodes_[n].has(RESIDENT) ? n : NONE;
}

std::uint32_t Index::find_or_make(std::uint32_t space, const Key& key) {
    const std::uint64_t h = Table::hash(space, key);
    std::uint32_t n = table_.find(h, space, key);
    if (n == NONE) {
        if (nodes_.end() >= Table::MOST_NODES) throw std::length_error("the index is full");
        n = nodes_.take();
        nodes_[n].key = key;
        nodes_[n].space = space;
        table_.add(h, n);
    }
    return n;
}

void Index::lookup(
    const Digest& space, std::span<const std::uint8_t> keys, const std::uint8_t* parents, Numbers& found) {
    const std::size_t count = keys.size() / KEY_BYTES;
    found.assign(count, NONE);
    const std::uint32_t number = known_space(space);
    if (number == NONE) return;
    // Three passes, so that the memory that one page needs is on its way while others are looked at.
    hashes_.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
        hashes_[i] = Table::hash(number, Key::from(&keys[i * KEY_BYTES]));
        table_.prefetch(hashes_[i]);
    }
    for (std::size_t i = 0; i < count; ++i) table_.prefetch_node(hashes_[i]);
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t n = table_.find(hashes_[i], number, Key::from(&keys[i * KEY_BYTES]));
        if (n != NONE && nodes_[n].has(RESIDENT) && !expired(n)) found[i] = n;
    }
    if (parents != nullptr)
        for (std::size_t i = 0; i < count; ++i)
            if (found[i] != NONE && nodes_[found[i]].parent == NONE) link(found[i], Key::from(parents + i * KEY_BYTES));
}

Page Index::page(std::uint32_t n) const {
    const Node& node = nodes_[n];
    const Place& place = places_[node.place];
    Page page{spaces_[node.space]->digest, node.key, {}, place.folder, place.extent, node.slot,
              node.generation, node.seconds * SECOND, node.has(OWN), pins_.count(n)};
    if (node.parent != NONE) page.parent = nodes_[node.parent].key;
    return page;
}

Page Index::pinned(std::uint32_t handle) {
    const std::uint32_t n = pins_.node(handle);
    return n == NONE ? pins_.gone(handle) : page(n);
}

// -- pages -------------------------------------------------------------------------------------------------------

std::uint32_t Index::insert(const Page& page, bool oldest, Page* old, bool* replaced) {
    if (page.slot >= MOST_SLOTS) throw std::invalid_argument("no extent has that many slots");
    const std::uint32_t known = find(page.space, page.key);
    *replaced = known != NONE;
    if (known != NONE) {
        *old = this->page(known);
        remove(known, false);
    }
    // A slot holds one page: whatever the index thought was there is gone.
    const std::uint32_t stale = at(page.folder, page.extent, page.slot);
    if (stale != NONE) remove(stale, false);

    const std::uint32_t space = space_number(page.space);
    const std::uint32_t n = find_or_make(space, page.key);
    Node& node = nodes_[n];
    if (node.has(WENT)) lift(n);
    node.generation = page.generation;
    node.seconds = static_cast<std::uint32_t>(std::min<std::uint64_t>(page.time_ns / SECOND, NONE));
    node.slot = page.slot;
    node.flags = RESIDENT | (page.own ? OWN : 0);
    node.place = place_number(page.folder, page.extent);
    Place& place = places_[node.place];
    if (page.slot >= place.slots.capacity()) place.slots.reserve(page.slot + page.slot / 8 + 8);
    if (page.slot >= place.slots.size()) place.slots.resize(page.slot + 1, NONE);
    place.slots[page.slot] = n;
    place.stored_from = std::min<std::uint64_t>(place.stored_from, node.seconds);
    place.see(node.seconds);
    ++place.pages;
    ++resident_;
    ++spaces_[space]->pages;
    if (page.own)
        order(node).inserted(n, hash(node), oldest);
    else
        node.rank = static_cast<std::int64_t>(order(node).next_number());
    set_parent(n, page.parent);
    if (page.own && node.own_children() == 0) order(node).became_leaf(n);
    return n;
}

void Index::remove(std::uint32_t n, bool evicted) {
    Node& node = nodes_[n];
    const bool own = node.has(OWN);
    if (node.has(PINNED)) pins_.page_goes(n, page(n));
    pins_.forget_failures(n);
    if (own) order(node).removed(n, hash(node), evicted);
    Place& place = places_[node.place];
    place.slots[node.slot] = NONE;
    if (--place.pages == 0) {
        place_numbers_.erase({place.folder, place.extent});
        free_places_.push_back(node.place);
        last_place_ = NONE;
        place.slots = Numbers();
    }
    --resident_;
    Space& space = *spaces_[node.space];
    if (--space.pages == 0) space.touched = 0;
    const std::uint32_t parent = node.parent;
    node.parent = node.place = NONE;
    node.flags = 0;
    if (own && evicted && node.below != 0) {
        node.flags = WENT;
        orphans_ += node.below;
    }
    if (parent != NONE) {
        drop_child(parent, own);
        drop_if_unnamed(parent);
    }
    drop_if_unnamed(n);
}

void Index::protect(const Digest& space, std::span<const std::uint8_t> keys) {
    for (const std::uint32_t n : protected_) nodes_[n].flags &= ~PROTECTED;
    protected_.clear();
    for (std::size_t at = 0; at + KEY_BYTES <= keys.size(); at += KEY_BYTES) {
        const std::uint32_t n = find(space, Key::from(&keys[at]));
        if (n == NONE) continue;
        nodes_[n].flags |= PROTECTED;
        protected_.push_back(n);
    }
}

std::uint32_t Index::victim(const Digest& space) {
    const std::uint32_t number = known_space(space);
    if (number == NONE) return NONE;
    const std::uint32_t n = spaces_[number]->order.victim(false);
    return n != NONE ? n : spaces_[number]->order.victim(true);
}

std::vector<Page> Index::evict(
    const Digest& space, std::size_t count, std::span<const std::uint8_t> protected_keys) {
    protect(space, protected_keys);
    std::vector<Page> gone;
    while (gone.size() < count) {
        const std::uint32_t n = victim(space);
        if (n == NONE) break;
        gone.push_back(page(n));
        remove(n, true);
    }
    protect(space, {});
    return gone;
}

Numbers Index::going(const Digest& space, std::size_t count, std::size_t examine) {
    protect(space, {});  // left over from whoever asked for a victim last
    const std::uint32_t number = known_space(space);
    if (number == NONE) return {};
    Numbers found = spaces_[number]->order.going(count, examine);
    std::erase_if(found, [this](std::uint32_t n) { return expired(n); });
    return found;
}

std::uint32_t Index::same(const Page& page) const {
    const std::uint32_t n = find(page.space, page.key);
    if (n == NONE) return NONE;
    const Page known = this->page(n);
    const bool is_same = known.folder == page.folder && known.extent == page.extent && known.slot == page.slot &&
                         known.generation == page.generation;
    return is_same ? n : NONE;
}

std::uint64_t Index::touched(const Digest& space) const {
    const std::uint32_t number = known_space(space);
    return number == NONE ? 0 : spaces_[number]->touched;
}

}  // namespace hicache::index
