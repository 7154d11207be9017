// From (namespace, key) to a node: open addressing with linear probing, 4 bytes a place.
//
// Belongs here: finding. Does not belong here: what a node means.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "index/node.hpp"

namespace hicache::index {

/// Four bits of the hash beside the number of the node spare most looks at nodes of other keys.
class Table {
public:
    static constexpr std::uint32_t MOST_NODES = (1u << 28) - 1;

    explicit Table(Nodes& nodes) : nodes_(nodes), slots_(64, NONE) {}

    static std::uint64_t hash(std::uint32_t space, const Key& key) {
        std::uint64_t h = key.words[0] ^ std::rotl(key.words[1], 17) ^ std::rotl(key.words[2], 31) ^
                          std::rotl(key.words[3], 47);
        h += space * 0x9E3779B97F4A7C15ull;
        // The finaliser of SplitMix64: keys are hashes, but those of tests and of other engines need not be.
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
        h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
        return h ^ (h >> 31);
    }

    void prefetch(std::uint64_t h) const { __builtin_prefetch(&slots_[h & mask()]); }

    /// Bring the node that `find` will look at first.
    void prefetch_node(std::uint64_t h) const {
        const std::uint32_t slot = slots_[h & mask()];
        if (slot != NONE) {
            const char* node = reinterpret_cast<const char*>(&nodes_[slot & MOST_NODES]);
            __builtin_prefetch(node);
            __builtin_prefetch(node + sizeof(Node) - 1);
        }
    }

    std::uint32_t find(std::uint64_t h, std::uint32_t space, const Key& key) const {
        for (std::size_t at = h & mask();; at = (at + 1) & mask()) {
            const std::uint32_t slot = slots_[at];
            if (slot == NONE) return NONE;
            if (slot >> 28 != h >> 60) continue;
            const Node& node = nodes_[slot & MOST_NODES];
            if (node.key == key && node.space == space) return slot & MOST_NODES;
        }
    }

    void add(std::uint64_t h, std::uint32_t n) {
        if ((used_ + 1) * 4 > slots_.size() * 3) grow();
        put(h, n);
        ++used_;
    }

    void erase(std::uint32_t n) {
        std::size_t at = hash(nodes_[n].space, nodes_[n].key) & mask();
        while (slots_[at] == NONE || (slots_[at] & MOST_NODES) != n) at = (at + 1) & mask();
        // Move back what probing put behind it, so that no probe ends too early (Knuth, TAOCP 3, 6.4, algorithm R).
        for (std::size_t next = (at + 1) & mask(); slots_[next] != NONE; next = (next + 1) & mask()) {
            const Node& node = nodes_[slots_[next] & MOST_NODES];
            const std::size_t home = hash(node.space, node.key) & mask();
            if (((next - home) & mask()) >= ((next - at) & mask())) {
                slots_[at] = slots_[next];
                at = next;
            }
        }
        slots_[at] = NONE;
        --used_;
    }

    std::size_t bytes() const { return slots_.capacity() * sizeof(std::uint32_t); }

private:
    std::size_t mask() const { return slots_.size() - 1; }

    void put(std::uint64_t h, std::uint32_t n) {
        std::size_t at = h & mask();
        while (slots_[at] != NONE) at = (at + 1) & mask();
        slots_[at] = static_cast<std::uint32_t>(h >> 60) << 28 | n;
    }

    void grow() {
        std::vector<std::uint32_t> old(slots_.size() * 2, NONE);
        old.swap(slots_);
        for (const std::uint32_t slot : old)
            if (slot != NONE) {
                const Node& node = nodes_[slot & MOST_NODES];
                put(hash(node.space, node.key), slot & MOST_NODES);
            }
    }

    Nodes& nodes_;
    std::vector<std::uint32_t> slots_;
    std::size_t used_ = 0;
};

}  // namespace hicache::index
