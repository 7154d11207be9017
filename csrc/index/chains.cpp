// How pages hang together: parents, walks along chains, and what becomes of pages whose parent went.
#include <algorithm>

#include "index/index.hpp"

namespace hicache::index {

void Index::set_parent(std::uint32_t n, const Key& parent) {
    if (parent.unknown() || parent == nodes_[n].key) return;
    const std::uint32_t above = find_or_make(nodes_[n].space, parent);
    nodes_[n].parent = above;
    add_child(above, nodes_[n].has(OWN));
}

void Index::add_child(std::uint32_t parent, bool own) {
    Node& above = nodes_[parent];
    if (!own) {
        ++above.other_children;
        return;
    }
    if (above.has(LEAF)) order(above).has_children(parent);
    ++above.below;
    if (above.has(WENT)) ++orphans_;
}

void Index::drop_child(std::uint32_t parent, bool own) {
    Node& above = nodes_[parent];
    if (!own) {
        --above.other_children;
        return;
    }
    if (above.has(WENT)) --orphans_;
    if (--above.below != 0) return;
    above.flags &= ~WENT;
    if (above.has(OWN)) order(above).became_leaf(parent);
}

void Index::drop_if_unnamed(std::uint32_t n) {
    const Node& node = nodes_[n];
    if (node.has(RESIDENT) || node.own_children() != 0 || node.other_children != 0) return;
    table_.erase(n);
    nodes_.give(n);
}

void Index::link(std::uint32_t n, const Key& parent) {
    if (nodes_[n].parent == NONE) set_parent(n, parent);
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
            if (node.has(WENT)) lift(n);
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

/// Somebody uses what hangs below: it is no orphan, whoever asked has the page that went.
void Index::lift(std::uint32_t n) {
    nodes_[n].flags &= ~WENT;
    orphans_ -= nodes_[n].below;
}

Numbers Index::find_orphans(std::size_t limit, std::size_t examine) {
    Numbers found;
    if (orphans_ == 0) return found;
    for (; examine != 0 && found.size() < limit; --examine) {
        const std::uint32_t n = sweep_at_;
        Node& node = nodes_[n];
        // A page below one that was just found will be an orphan when that went.
        if (node.has(OWN) && (node.flags & (PINNED | SEEN)) == 0 && node.parent != NONE &&
            (nodes_[node.parent].flags & (WENT | SEEN)) != 0) {
            node.flags |= SEEN;
            found.push_back(n);
        }
        if (n == (sweep_up_ ? nodes_.end() - 1 : 0))
            sweep_up_ = !sweep_up_;
        else
            sweep_at_ = sweep_up_ ? n + 1 : n - 1;
    }
    for (const std::uint32_t n : found) nodes_[n].flags &= ~SEEN;
    return found;
}

}  // namespace hicache::index
