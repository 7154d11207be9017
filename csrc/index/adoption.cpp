// Folders that become ours: their pages join the order of eviction, some at a time.
//
// Belongs here: in which order they do. Does not belong here: the order itself (order.cpp).
#include <algorithm>
#include <tuple>

#include "index/index.hpp"

namespace hicache::index {

bool Index::gather(Adoption& adoption, std::size_t examine) const {
    // In the order of memory: by places each page would cost a miss of the cache.
    for (; examine != 0 && adoption.looked < nodes_.end(); --examine, ++adoption.looked) {
        const Node& node = nodes_[adoption.looked];
        if (!node.has(RESIDENT) || node.has(OWN)) continue;
        const auto folder = std::find(adoption.folders.begin(), adoption.folders.end(), places_[node.place].folder);
        if (folder == adoption.folders.end()) continue;
        const auto queue = static_cast<std::uint32_t>(folder - adoption.folders.begin());
        adoption.pages.push_back({node.rank, 0, node.generation, node.space, queue, adoption.looked});
    }
    return adoption.looked == nodes_.end();
}

void Adoption::sort() {
    std::sort(pages.begin(), pages.end(), [](const Arrival& a, const Arrival& b) {
        return std::tuple(a.space, a.queue, a.rank) < std::tuple(b.space, b.queue, b.rank);
    });
    if (folders.size() < 2) return;
    for (std::size_t from = 0, to = 0; from < pages.size(); from = to) {
        while (to < pages.size() && pages[to].space == pages[from].space && pages[to].queue == pages[from].queue) ++to;
        for (std::size_t at = from; at < to; ++at)
            pages[at].share = static_cast<double>(at - from) / static_cast<double>(to - from);
    }
    std::sort(pages.begin(), pages.end(), [](const Arrival& a, const Arrival& b) {
        return std::tuple(a.space, a.share, a.queue) < std::tuple(b.space, b.share, b.queue);
    });
}

bool Index::adopt(Adoption& adoption, std::size_t count) {
    const std::size_t end = adoption.done + std::min(count, adoption.pages.size() - adoption.done);
    std::vector<Captured> adopted;
    for (; adoption.done < end; ++adoption.done) {
        const Arrival& arrival = adoption.pages[adoption.done];
        const std::uint32_t n = arrival.node;
        Node& node = nodes_[n];
        const bool there = node.has(RESIDENT) && !node.has(OWN) && node.generation == arrival.generation &&
                           node.space == arrival.space && places_[node.place].folder == adoption.folders[arrival.queue];
        if (!there) continue;
        if (node.parent != NONE) drop_child(node.parent, false);
        node.flags |= OWN;
        order(node).inserted(n, hash(node), false);
        if (node.parent != NONE) add_child(node.parent, true);
        if (node.own_children() == 0) order(node).became_leaf(n);
        adopted.push_back({node.rank, node.generation, node.tie, node.space, n});
    }
    // A log may name children before their parents: touching all of them restores "ancestors last".
    std::sort(adopted.begin(), adopted.end(), [](const Captured& a, const Captured& b) { return a.before(b); });
    Numbers nodes;
    for (const Captured& page : adopted) nodes.push_back(page.node);
    for (std::size_t from = 0, to = 0; from < nodes.size(); from = to) {
        while (to < nodes.size() && adopted[to].space == adopted[from].space) ++to;
        touch(spaces_[adopted[from].space]->digest, std::span(nodes).subspan(from, to - from), false);
    }
    return adoption.done == adoption.pages.size();
}

}  // namespace hicache::index
