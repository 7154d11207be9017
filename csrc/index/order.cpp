#include "index/order.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <queue>
#include <unordered_map>

namespace hicache::index {

namespace {

/// log2 of the uses in 1/256, rounded half to even as the model rounds: both must agree to the last bit.
const std::array<std::uint64_t, 256> LOG2_X256 = [] {
    std::array<std::uint64_t, 256> table{};
    for (int uses = 1; uses < 256; ++uses) table[uses] = static_cast<std::uint64_t>(std::nearbyint(256 * std::log2(uses)));
    return table;
}();

bool may_go(const Node& node, bool last_resort) {
    return (node.flags & (PINNED | PROTECTED)) == 0 && (last_resort || node.other_children == 0);
}

bool before(const Node& a, const Node& b) {
    return a.rank != b.rank ? a.rank < b.rank : static_cast<std::int32_t>(a.tie - b.tie) < 0;
}

}  // namespace

void Leaves::push(std::uint32_t n) {
    const Node& node = nodes_[n];
    if (heap_.size() == heap_.capacity()) heap_.reserve(heap_.size() + heap_.size() / 8 + 64);
    heap_.push_back({node.rank, node.tie, n});
    nodes_[n].flags |= LEAF;
    up(heap_.size() - 1);
}

void Leaves::remove(std::uint32_t n) {
    if (!nodes_[n].has(LEAF)) return;
    const std::size_t at = nodes_[n].below;
    nodes_[n].flags &= ~LEAF;
    nodes_[n].below = 0;
    const Entry last = heap_.back();
    heap_.pop_back();
    if (last.node == n) return;
    set(at, last);
    up(at);
    down(nodes_[last.node].below);
}

std::uint32_t Leaves::top() {
    while (!heap_.empty()) {
        Entry& first = heap_[0];
        const Node& node = nodes_[first.node];
        if (first.rank == node.rank && first.tie == node.tie) return first.node;
        first.rank = node.rank;
        first.tie = node.tie;
        down(0);
    }
    return NONE;
}

void Leaves::up(std::size_t at) {
    const Entry entry = heap_[at];
    while (at != 0 && entry.before(heap_[(at - 1) / 2])) {
        set(at, heap_[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    set(at, entry);
}

void Leaves::down(std::size_t at) {
    const Entry entry = heap_[at];
    for (;;) {
        std::size_t child = 2 * at + 1;
        if (child >= heap_.size()) break;
        if (child + 1 < heap_.size() && heap_[child + 1].before(heap_[child])) ++child;
        if (!heap_[child].before(entry)) break;
        set(at, heap_[child]);
        at = child;
    }
    set(at, entry);
}

void Ghosts::resize(std::uint64_t capacity) {
    const std::size_t lines = std::max<std::uint64_t>(1, (capacity + WAYS - 1) / WAYS);
    // Growing a little keeps what is known; a real change of size begins anew, since lines follow the size.
    if (!lines_.empty() && lines <= lines_.size() + lines_.size() / 4 && lines * 2 >= lines_.size()) return;
    lines_.assign(lines, Line{});
    lines_.shrink_to_fit();
}

void Ghosts::add(std::uint64_t hash, std::uint8_t value) {
    take(hash);
    Line& found = line(hash);
    std::memmove(found.ghosts + 1, found.ghosts, sizeof(found.ghosts) - sizeof(found.ghosts[0]));
    found.ghosts[0] = static_cast<std::uint32_t>(hash) << 8 | value;
}

std::uint8_t Ghosts::take(std::uint64_t hash) {
    Line& found = line(hash);
    for (std::size_t way = 0; way < WAYS; ++way) {
        const std::uint32_t ghost = found.ghosts[way];
        if (ghost == 0 || ghost >> 8 != (static_cast<std::uint32_t>(hash) << 8) >> 8) continue;
        std::memmove(found.ghosts + way, found.ghosts + way + 1, (WAYS - 1 - way) * sizeof(ghost));
        found.ghosts[WAYS - 1] = 0;
        return static_cast<std::uint8_t>(ghost);
    }
    return 0;
}

void Order::set_capacity(std::uint64_t pages) {
    capacity_ = std::max<std::uint64_t>(1, pages);
    if (policy_ == Policy::S3Fifo) ghosts_.resize(capacity_ - std::max<std::uint64_t>(1, capacity_ / 10));
    if (policy_ == Policy::Credit) ghosts_.resize(capacity_);
}

void Order::rank(Node& node) {
    const std::uint64_t number = next_number();
    if (policy_ == Policy::Credit) {
        node.rank = static_cast<std::int64_t>(written_ + capacity_ * LOG2_X256[node.uses] / 512);
        node.tie = static_cast<std::uint32_t>(number);
    } else {
        node.rank = static_cast<std::int64_t>(number);
    }
}

void Order::inserted(std::uint32_t n, std::uint64_t hash, bool oldest) {
    Node& node = nodes_[n];
    ++written_;
    node.uses = 1;
    node.visits = 0;
    node.flags &= ~MAIN;
    if (policy_ == Policy::Credit) node.uses = std::min(255u, 1u + ghosts_.take(hash));
    if (policy_ == Policy::S3Fifo && ghosts_.take(hash)) node.flags |= MAIN;
    ++sizes_[node.has(MAIN)];
    rank(node);
    if (oldest) node.rank = --oldest_;
}

void Order::touched(Node& node, bool used) {
    if (policy_ == Policy::S3Fifo) {
        if (used && node.visits < 3) ++node.visits;
        return;
    }
    if (used && node.uses < 255) ++node.uses;
    rank(node);
}

void Order::removed(std::uint32_t n, std::uint64_t hash, bool evicted) {
    const Node& node = nodes_[n];
    queue(nodes_[n]).remove(n);
    --sizes_[node.has(MAIN)];
    if (evicted && policy_ == Policy::Credit) ghosts_.add(hash, static_cast<std::uint8_t>(node.uses));
    if (evicted && policy_ == Policy::S3Fifo && !node.has(MAIN)) ghosts_.add(hash, 1);
}

std::uint32_t Order::victim(bool last_resort) {
    if (policy_ == Policy::S3Fifo) return s3fifo_victim(last_resort);
    return queues_[0].first([=](const Node& node) { return may_go(node, last_resort); });
}

std::uint32_t Order::s3fifo_victim(bool last_resort) {
    const auto goes = [=](const Node& node) { return may_go(node, last_resort); };
    const std::uint64_t share = std::max<std::uint64_t>(1, capacity_ / 10);
    for (;;) {
        const std::uint32_t small = queues_[0].first(goes), main = queues_[1].first(goes);
        const std::uint32_t n = main == NONE || (small != NONE && sizes_[0] >= share) ? small : main;
        if (n == NONE) return NONE;
        Node& node = nodes_[n];
        if (!node.has(MAIN) && node.visits > 1)
            node.visits = 0;
        else if (node.has(MAIN) && node.visits != 0)
            --node.visits;
        else
            return n;
        queue(node).remove(n);
        --sizes_[node.has(MAIN)];
        ++sizes_[1];
        node.flags |= MAIN;
        rank(node);
        queue(node).push(n);
    }
}

std::vector<std::uint32_t> Order::going(std::size_t count, std::size_t examine) {
    // Leaves are taken out of their queues and put back at the end. Pages that would be leaves by then wait in `above`.
    const auto later = [this](std::uint32_t a, std::uint32_t b) { return before(nodes_[b], nodes_[a]); };
    using Above = std::priority_queue<std::uint32_t, std::vector<std::uint32_t>, decltype(later)>;
    Above above[2]{Above(later), Above(later)};
    std::unordered_map<std::uint32_t, std::uint32_t> children;  // that would be left, of pages that lost one
    std::vector<std::uint32_t> found, aside;
    const std::uint64_t share = std::max<std::uint64_t>(1, capacity_ / 10);
    std::uint64_t small_size = sizes_[0];
    for (; found.size() < count && examine != 0; --examine) {
        std::uint32_t first[2];
        for (int q = 0; q < 2; ++q) {
            first[q] = queues_[q].top();
            if (!above[q].empty() && (first[q] == NONE || before(nodes_[above[q].top()], nodes_[first[q]])))
                first[q] = above[q].top();
        }
        const int q = first[1] == NONE || (first[0] != NONE && (policy_ != Policy::S3Fifo || small_size >= share)) ? 0 : 1;
        const std::uint32_t n = first[q];
        if (n == NONE) break;
        const Node& node = nodes_[n];
        if (node.has(LEAF)) {
            queues_[q].remove(n);
            aside.push_back(n);
        } else {
            above[q].pop();
        }
        if (!may_go(node, false)) continue;
        if (q == 0) --small_size;
        if (policy_ == Policy::S3Fifo && node.visits > (q == 0 ? 1u : 0u)) continue;
        found.push_back(n);
        if (node.parent == NONE || !nodes_[node.parent].has(OWN)) continue;
        std::uint32_t& left = children.try_emplace(node.parent, nodes_[node.parent].below).first->second;
        if (--left == 0) above[nodes_[node.parent].has(MAIN)].push(node.parent);
    }
    for (const std::uint32_t n : aside) queue(nodes_[n]).push(n);
    return found;
}

}  // namespace hicache::index
