// Reads under way: which pages are in use, by how many, and how often they could not be read.
//
// Belongs here: handles that outlive their pages. Does not belong here: what follows for eviction (order.cpp).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "index/node.hpp"
#include "index/page.hpp"

namespace hicache::index {

/// Nodes that are in use carry the flag PINNED and share one handle among all their readers.
class Pins {
public:
    explicit Pins(Nodes& nodes) : nodes_(nodes) {}

    std::uint32_t take(std::uint32_t n) {
        Node& node = nodes_[n];
        if (!node.has(PINNED)) {
            node.flags |= PINNED;
            handles_[n] = fresh();
        }
        const std::uint32_t handle = handles_.at(n);
        Pin& pin = pins_[handle];
        pin.node = n;
        ++pin.count;
        return handle;
    }

    /// Whether this was the last reader of a page that went meanwhile.
    bool give(std::uint32_t handle) {
        Pin& pin = known(handle);
        if (--pin.count != 0) return false;
        const bool gone = pin.node == NONE;
        if (gone)
            gone_.erase(handle);
        else {
            nodes_[pin.node].flags &= ~PINNED;
            handles_.erase(pin.node);
        }
        pin.failures = 0;
        pin.node = free_;
        free_ = handle;
        return gone;
    }

    /// The page goes: its readers keep `page`, what is known of its failures goes with it.
    void page_goes(std::uint32_t n, const Page& page) {
        const std::uint32_t handle = handles_.at(n);
        pins_[handle].node = NONE;
        pins_[handle].failures = failures(n);
        handles_.erase(n);
        gone_.emplace(handle, page);
    }
    void forget_failures(std::uint32_t n) {
        if (!failures_.empty()) failures_.erase(n);
    }

    /// The node, or NONE when the page went: then `gone` has it.
    std::uint32_t node(std::uint32_t handle) { return known(handle).node; }
    const Page& gone(std::uint32_t handle) const { return gone_.at(handle); }

    std::uint32_t count(std::uint32_t n) const { return nodes_[n].has(PINNED) ? pins_[handles_.at(n)].count : 0; }

    /// Count a failed read, which is remembered as long as the page is resident; how many there were.
    std::uint32_t fail(std::uint32_t handle) {
        Pin& pin = known(handle);
        return pin.node == NONE ? ++pin.failures : ++failures_[pin.node];
    }

    std::size_t bytes() const {
        return pins_.capacity() * sizeof(Pin) + (handles_.size() + failures_.size()) * 32 + gone_.size() * sizeof(Page);
    }

private:
    struct Pin {
        std::uint32_t node = NONE;
        std::uint32_t count = 0;
        std::uint32_t failures = 0;
    };

    std::uint32_t fresh() {
        if (free_ == NONE) {
            pins_.emplace_back();
            return static_cast<std::uint32_t>(pins_.size() - 1);
        }
        const std::uint32_t handle = free_;
        free_ = pins_[handle].node;
        return handle;
    }

    Pin& known(std::uint32_t handle) {
        if (handle >= pins_.size() || pins_[handle].count == 0) throw std::out_of_range("no read has this handle");
        return pins_[handle];
    }

    std::uint32_t failures(std::uint32_t n) const {
        const auto found = failures_.find(n);
        return found == failures_.end() ? 0 : found->second;
    }

    Nodes& nodes_;
    std::vector<Pin> pins_;  // by handle
    std::uint32_t free_ = NONE;
    std::unordered_map<std::uint32_t, std::uint32_t> handles_;   // by node
    std::unordered_map<std::uint32_t, std::uint32_t> failures_;  // by node: of few
    std::unordered_map<std::uint32_t, Page> gone_;               // by handle: of few
};

}  // namespace hicache::index
