// What is told of pages: one by one, a folder's at one moment, and those that become ours.
//
// Belongs here: copies that outlive what they tell of. Does not belong here: the index's own record of a page (node.hpp).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "index/node.hpp"

namespace hicache::index {

using Digest = std::array<std::uint8_t, SPACE_BYTES>;
using Numbers = std::vector<std::uint32_t>;

/// One page as it is told to others.
struct Page {
    Digest space;
    Key key;
    Key parent;
    std::uint32_t folder;
    std::uint32_t extent;
    std::uint32_t slot;
    std::uint64_t generation;
    std::uint64_t time_ns;
    bool own;
    std::uint32_t pins;
};

/// A page as a snapshot holds it: enough to sort it, and to tell later whether it is still there.
struct Captured {
    std::int64_t rank;
    std::uint64_t generation;
    std::uint32_t tie;
    std::uint32_t space;
    std::uint32_t node;

    bool before(const Captured& other) const {
        if (space != other.space) return space < other.space;
        if (rank != other.rank) return rank < other.rank;
        return static_cast<std::int32_t>(tie - other.tie) < 0;
    }
};

/// A folder's own pages at one moment.
struct Snapshot {
    std::uint32_t folder;
    std::vector<Captured> pages;

    /// First to go first. Looks at nothing that the index changes: needs neither the lock nor the GIL.
    void sort();
};

/// A page that is about to become ours. share: of its folder's pages of the namespace, those that came before.
struct Arrival {
    std::int64_t rank;
    double share;
    std::uint64_t generation;
    std::uint32_t space;
    std::uint32_t queue;  // which of the folders
    std::uint32_t node;
};

/// Folders that become ours, a step at a time: `Index::gather` until it is done, `sort`, `Index::adopt` until it is done.
struct Adoption {
    explicit Adoption(const Numbers& named) {
        for (const std::uint32_t folder : named)
            if (std::find(folders.begin(), folders.end(), folder) == folders.end()) folders.push_back(folder);
    }

    /// Looks at nothing that the index changes: needs neither the lock nor the GIL.
    void sort();

    Numbers folders;  // each once
    std::vector<Arrival> pages;
    std::uint32_t looked = 0;
    std::size_t done = 0;
};

}  // namespace hicache::index
