// Orders of eviction: which leaf of a namespace goes next. The models are storage_backends/local/policy.
//
// Belongs here: ranks, queues of leaves, ghosts. Does not belong here: keys, chains, places (index.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "index/node.hpp"

namespace hicache::index {

enum class Policy { Lru, S3Fifo, Credit };

/// Own pages without own resident children, lowest rank first: a binary heap.
///
/// A page that is used gets a higher rank and stays where it is; its entry is put right when it comes up. So a lookup
/// costs the heap nothing.
class Leaves {
public:
    explicit Leaves(Nodes& nodes) : nodes_(nodes) {}

    void push(std::uint32_t n);
    void remove(std::uint32_t n);

    /// The first leaf, which stays; NONE when there is none.
    std::uint32_t top();

    /// The first leaf that `may_go`, which stays; NONE when there is none.
    template <class MayGo>
    std::uint32_t first(MayGo may_go) {
        std::uint32_t found = NONE;
        aside_.clear();
        for (std::uint32_t n = top(); n != NONE; n = top()) {
            if (may_go(nodes_[n])) {
                found = n;
                break;
            }
            aside_.push_back(n);
            remove(n);
        }
        for (const std::uint32_t n : aside_) push(n);
        return found;
    }

    std::size_t bytes() const { return heap_.capacity() * sizeof(Entry); }

private:
    struct Entry {
        std::int64_t rank;
        std::uint32_t tie;
        std::uint32_t node;

        bool before(const Entry& other) const {
            return rank != other.rank ? rank < other.rank : static_cast<std::int32_t>(tie - other.tie) < 0;
        }
    };

    void set(std::size_t at, const Entry& entry) {
        heap_[at] = entry;
        nodes_[entry.node].below = static_cast<std::uint32_t>(at);
    }
    void up(std::size_t at);
    void down(std::size_t at);

    Nodes& nodes_;
    std::vector<Entry> heap_;
    std::vector<std::uint32_t> aside_;
};

/// What is known of pages that went: 24 bits of each key's hash and a number, 4 bytes a ghost.
///
/// First in, first out among the sixteen of a cache line: what one global queue does on average, without its links.
class Ghosts {
public:
    void resize(std::uint64_t capacity);
    void add(std::uint64_t hash, std::uint8_t value);
    /// What was known, which is forgotten; 0: nothing.
    std::uint8_t take(std::uint64_t hash);
    std::size_t bytes() const { return lines_.capacity() * sizeof(Line); }

private:
    static constexpr std::size_t WAYS = 16;
    struct Line {
        std::uint32_t ghosts[WAYS];  // newest first; 0: none
    };
    Line& line(std::uint64_t hash) { return lines_[(hash >> 32) % lines_.size()]; }

    std::vector<Line> lines_;
};

/// One namespace's order. LRU; S3-FIFO (Yang et al., SOSP '23); credit: LFU-DA's ageing (Arlitt et al., 1999) on a
/// clock of pages written, with half a turnover of the tier for each doubling of a page's uses. See the models.
class Order {
public:
    Order(Policy policy, Nodes& nodes) : policy_(policy), nodes_(nodes), queues_{Leaves(nodes), Leaves(nodes)} {
        set_capacity(1);
    }

    void set_capacity(std::uint64_t pages);

    /// A page of ours came. oldest: nobody has asked for it, it goes first.
    void inserted(std::uint32_t n, std::uint64_t hash, bool oldest);
    void touched(Node& node, bool used);
    void removed(std::uint32_t n, std::uint64_t hash, bool evicted);

    /// Its count of own children is 0 from here on, or about to be more.
    void became_leaf(std::uint32_t n) { queue(nodes_[n]).push(n); }
    void has_children(std::uint32_t n) { queue(nodes_[n]).remove(n); }

    /// NONE when no page may go. last_resort: pages that have children in other writers' folders may go, too.
    std::uint32_t victim(bool last_resort);

    /// Up to `count` pages that `victim` would give one after the other, were each evicted, if nothing is used or stored
    /// meanwhile; without a last resort, and under S3-FIFO without pages that get another round. Looks at so many pages.
    std::vector<std::uint32_t> going(std::size_t count, std::size_t examine);

    std::uint64_t next_number() { return ++clock_; }
    std::size_t bytes() const { return queues_[0].bytes() + queues_[1].bytes() + ghosts_.bytes(); }

private:
    Leaves& queue(const Node& node) { return queues_[node.has(MAIN)]; }
    void rank(Node& node);
    std::uint32_t s3fifo_victim(bool last_resort);

    Policy policy_;
    Nodes& nodes_;
    Leaves queues_[2];
    Ghosts ghosts_;
    std::uint64_t capacity_ = 0;
    std::uint64_t clock_ = 0;
    std::int64_t oldest_ = 0;
    std::uint64_t written_ = 0;
    std::uint64_t sizes_[2] = {0, 0};
};

}  // namespace hicache::index
