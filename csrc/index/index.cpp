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
    return total + pins_.size() * (sizeof(Pin) + 32);
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
    if (fresh) spaces_.push_back(std::make_unique<Space>(digest, policy_, nodes_));
    return found->second;
}

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
        places_[found->second] = Place{folder, extent, 0, {}, NEVER};
    }
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

std::uint32_t Index::at(std::uint32_t folder, std::uint32_t extent, std::uint32_t slot) const {
    const std::uint32_t place = known_place(folder, extent);
    if (place == NONE) return NONE;
    const Numbers& slots = places_[place].slots;
    return slot < slots.size() ? slots[slot] : NONE;
}

Page Index::page(std::uint32_t n) const {
    const Node& node = nodes_[n];
    const Place& place = places_[node.place];
    Page page{spaces_[node.space]->digest, node.key, {}, place.folder, place.extent, node.slot,
              node.generation, node.time_ns, node.has(OWN), 0};
    if (node.parent != NONE) page.parent = nodes_[node.parent].key;
    if (node.pin != NONE) page.pins = pins_.at(node.pin).count;
    return page;
}

// -- chains ------------------------------------------------------------------------------------------------------

void Index::set_parent(std::uint32_t n, const Key& parent) {
    if (parent.unknown() || parent == nodes_[n].key) return;
    const std::uint32_t above = find_or_make(nodes_[n].space, parent);
    nodes_[n].parent = above;
    add_child(above, nodes_[n].has(OWN));
}

void Index::add_child(std::uint32_t parent, bool own) {
    Node& above = nodes_[parent];
    if (!own)
        ++above.other_children;
    else if (++above.own_children == 1 && above.has(OWN))
        order(above).has_children(parent);
}

void Index::drop_child(std::uint32_t parent, bool own) {
    Node& above = nodes_[parent];
    if (!own)
        --above.other_children;
    else if (--above.own_children == 0 && above.has(OWN))
        order(above).became_leaf(parent);
}

void Index::drop_if_unnamed(std::uint32_t n) {
    const Node& node = nodes_[n];
    if (node.has(RESIDENT) || node.own_children != 0 || node.other_children != 0) return;
    table_.erase(n);
    nodes_.give(n);
}

void Index::link(std::uint32_t n, const Key& parent) {
    if (nodes_[n].parent == NONE) set_parent(n, parent);
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

void Index::touch(const Digest& space, std::span<const std::uint32_t> nodes, bool used) {
    const std::uint32_t number = known_space(space);
    if (number == NONE || spaces_[number]->pages == 0) return;
    Space& there = *spaces_[number];
    there.touched = ++clock_;
    // Walks from the last page on, up to what an earlier walk has seen. A later walk ends below an earlier one, so its
    // pages are descendants and come first: of pages touched together, ancestors are the most recent.
    walk_.clear();
    Numbers starts;
    for (std::size_t i = nodes.size(); i-- > 0;) {
        starts.push_back(static_cast<std::uint32_t>(walk_.size()));
        for (std::uint32_t n = nodes[i]; n != NONE; n = nodes_[n].parent) {
            Node& node = nodes_[n];
            if (!node.has(RESIDENT) || node.has(SEEN)) break;
            node.flags |= SEEN;
            walk_.push_back(n);
        }
    }
    std::size_t end = walk_.size();
    for (std::size_t i = starts.size(); i-- > 0;) {
        for (std::size_t at = starts[i]; at < end; ++at) {
            Node& node = nodes_[walk_[at]];
            node.flags &= ~SEEN;
            if (node.has(OWN)) there.order.touched(node, used);
        }
        end = starts[i];
    }
}

Numbers Index::ancestors(const Digest& space, const Key& key) {
    Numbers found;
    for (std::uint32_t n = find(space, key); n != NONE; n = nodes_[n].parent) {
        if (!nodes_[n].has(RESIDENT) || nodes_[n].has(SEEN)) break;
        nodes_[n].flags |= SEEN;
        found.push_back(n);
    }
    for (const std::uint32_t n : found) nodes_[n].flags &= ~SEEN;
    std::erase_if(found, [this](std::uint32_t n) { return expired(n); });
    return found;
}

Numbers Index::descendants(const Numbers& roots) {
    // Each page's distance below a root, by walks up that stop at what is known: every page is passed once.
    constexpr std::uint32_t UNKNOWN = NONE, OUTSIDE = NONE - 1, OPEN = NONE - 2;
    if (roots.empty()) return {};
    const std::uint32_t space = nodes_[roots[0]].space;
    Numbers depth(nodes_.end(), UNKNOWN), found, walk;
    for (const std::uint32_t root : roots) depth[root] = 0;
    for (std::uint32_t start = 0; start < nodes_.end(); ++start) {
        if (!nodes_[start].has(OWN) || nodes_[start].space != space) continue;
        walk.clear();
        std::uint32_t n = start;
        while (n != NONE && depth[n] == UNKNOWN) {
            depth[n] = OPEN;
            walk.push_back(n);
            n = nodes_[n].has(OWN) ? nodes_[n].parent : NONE;
        }
        std::uint32_t above = n == NONE || depth[n] == OPEN ? OUTSIDE : depth[n];
        while (!walk.empty()) {
            if (above != OUTSIDE) {
                ++above;
                found.push_back(walk.back());
            }
            depth[walk.back()] = above;
            walk.pop_back();
        }
    }
    std::stable_sort(found.begin(), found.end(), [&](auto a, auto b) { return depth[a] > depth[b]; });
    return found;
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
    node.generation = page.generation;
    node.time_ns = page.time_ns;
    node.slot = page.slot;
    node.failures = 0;
    node.flags = RESIDENT | (page.own ? OWN : 0);
    node.place = place_number(page.folder, page.extent);
    Place& place = places_[node.place];
    if (page.slot >= place.slots.size()) place.slots.resize(page.slot + 1, NONE);
    place.slots[page.slot] = n;
    place.stored_from = std::min(place.stored_from, page.time_ns);
    ++place.pages;
    ++resident_;
    ++spaces_[space]->pages;
    if (page.own)
        order(node).inserted(n, hash(node), oldest);
    else
        node.rank = static_cast<std::int64_t>(order(node).next_number());
    set_parent(n, page.parent);
    if (page.own && node.own_children == 0) order(node).became_leaf(n);
    return n;
}

void Index::remove(std::uint32_t n, bool evicted) {
    Node& node = nodes_[n];
    const bool own = node.has(OWN);
    if (node.pin != NONE) {
        Pin& pin = pins_.at(node.pin);
        pin.page = page(n);
        pin.failures = node.failures;
        pin.node = NONE;
        node.pin = NONE;
    }
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
    if (parent != NONE) {
        drop_child(parent, own);
        drop_if_unnamed(parent);
    }
    drop_if_unnamed(n);
}

std::uint32_t Index::pin(std::uint32_t n) {
    Node& node = nodes_[n];
    if (node.pin == NONE) {
        do {
            ++next_pin_;
        } while (next_pin_ == NONE || pins_.contains(next_pin_));
        pins_.emplace(next_pin_, Pin{n, 0, 0, {}});
        node.pin = next_pin_;
    }
    ++pins_.at(node.pin).count;
    return node.pin;
}

bool Index::unpin(std::uint32_t handle) {
    Pin& pin = pins_.at(handle);
    if (--pin.count != 0) return false;
    const bool gone = pin.node == NONE;
    if (!gone) nodes_[pin.node].pin = NONE;
    pins_.erase(handle);
    return gone;
}

std::uint32_t Index::fail(std::uint32_t handle) {
    Pin& pin = pins_.at(handle);
    if (pin.node == NONE) return ++pin.failures;
    Node& node = nodes_[pin.node];
    if (node.failures < 255) ++node.failures;
    return node.failures;
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

std::uint32_t Index::same(const Page& page) const {
    const std::uint32_t n = find(page.space, page.key);
    if (n == NONE) return NONE;
    const Page known = this->page(n);
    const bool is_same = known.folder == page.folder && known.extent == page.extent && known.slot == page.slot &&
                         known.generation == page.generation;
    return is_same ? n : NONE;
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
        if (start == 0) place.stored_from = NEVER;
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
            place.stored_from = std::min(place.stored_from, node.time_ns);
            if (node.has(OWN) && node.space == number && expired(n)) found.push_back(n);
        }
    }
    there.swept_place = {0, 0};
    there.swept_slot = 0;
    return found;
}

std::uint64_t Index::touched(const Digest& space) const {
    const std::uint32_t number = known_space(space);
    return number == NONE ? 0 : spaces_[number]->touched;
}

// -- many --------------------------------------------------------------------------------------------------------

Numbers Index::in_extent(std::uint32_t folder, std::uint32_t extent) const {
    Numbers found;
    const auto place = place_numbers_.find({folder, extent});
    if (place != place_numbers_.end())
        for (const std::uint32_t n : places_[place->second].slots)
            if (n != NONE) found.push_back(n);
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

void Index::adopt(const Numbers& folders) {
    struct Arrival {
        std::uint32_t space;
        double share;  // of its folder's pages of the namespace, those that came before
        std::size_t queue;
        std::uint32_t node;
    };
    std::vector<Arrival> arrivals;
    for (std::size_t queue = 0; queue < folders.size(); ++queue) {
        Numbers pages = in_folder(folders[queue]);
        std::erase_if(pages, [this](std::uint32_t n) { return nodes_[n].has(OWN); });
        std::sort(pages.begin(), pages.end(), [this](std::uint32_t a, std::uint32_t b) {
            return std::pair(nodes_[a].space, nodes_[a].rank) < std::pair(nodes_[b].space, nodes_[b].rank);
        });
        for (std::size_t from = 0, to = 0; from < pages.size(); from = to) {
            const std::uint32_t space = nodes_[pages[from]].space;
            while (to < pages.size() && nodes_[pages[to]].space == space) ++to;
            for (std::size_t at = from; at < to; ++at)
                arrivals.push_back({space, static_cast<double>(at - from) / static_cast<double>(to - from), queue, pages[at]});
        }
    }
    if (folders.size() > 1)
        std::sort(arrivals.begin(), arrivals.end(), [](const Arrival& a, const Arrival& b) {
            return std::tuple(a.space, a.share, a.queue) < std::tuple(b.space, b.share, b.queue);
        });
    std::vector<Captured> adopted;
    for (const Arrival& arrival : arrivals) {
        const std::uint32_t n = arrival.node;
        Node& node = nodes_[n];
        if (node.has(OWN)) continue;  // a folder that was named twice
        if (node.parent != NONE) drop_child(node.parent, false);
        node.flags |= OWN;
        order(node).inserted(n, hash(node), false);
        if (node.parent != NONE) add_child(node.parent, true);
        if (node.own_children == 0) order(node).became_leaf(n);
        adopted.push_back({node.rank, node.generation, node.tie, node.space, n});
    }
    // A log may name children before their parents: one pass of touches restores "ancestors last".
    std::sort(adopted.begin(), adopted.end(), [](const Captured& a, const Captured& b) { return a.before(b); });
    Numbers nodes;
    for (const Captured& page : adopted) nodes.push_back(page.node);
    for (std::size_t from = 0, to = 0; from < nodes.size(); from = to) {
        while (to < nodes.size() && adopted[to].space == adopted[from].space) ++to;
        touch(spaces_[adopted[from].space]->digest, std::span(nodes).subspan(from, to - from), false);
    }
}

}  // namespace hicache::index
