// What the index knows of one page, in 80 bytes, and where nodes live.
//
// Belongs here: the layout. Does not belong here: what is done with it (index.cpp, order.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace hicache::index {

constexpr std::uint32_t NONE = 0xFFFFFFFF;
constexpr std::size_t KEY_BYTES = 32;
constexpr std::size_t SPACE_BYTES = 16;

struct Key {
    std::array<std::uint64_t, 4> words;

    static Key from(const void* bytes) {
        Key key;
        std::memcpy(key.words.data(), bytes, KEY_BYTES);
        return key;
    }
    bool operator==(const Key& other) const = default;
    /// No page: an unknown parent.
    bool unknown() const { return (words[0] | words[1] | words[2] | words[3]) == 0; }
};

enum Flag : std::uint8_t {
    RESIDENT = 1,    // without it the node only stands for a key that resident children name as their parent
    OWN = 2,         // this process writes its folder
    MAIN = 4,        // S3-FIFO: the main queue, else the small one
    SEEN = 8,        // during one walk
    PROTECTED = 16,  // may not go now
    PINNED = 32,     // reads use it
    LEAF = 64,       // in the order's queue of leaves
    WENT = 128       // not resident: evicted before its own children, which are orphans now
};

/// A page, or a parent that is known by name only. Links are numbers of nodes: half of a pointer.
///
/// Time is kept in seconds, as much as a time to live needs; a slot's header has the nanoseconds.
struct Node {
    Key key;
    std::uint64_t generation;
    std::int64_t rank;  // own pages: what the order sorts by; others' pages: the order in which they came
    std::uint32_t tie;  // decides between equal ranks
    std::uint32_t seconds;
    std::uint32_t place;
    std::uint32_t parent;
    std::uint32_t below;  // a leaf: its place in the queue of leaves; else how many own children are resident
    std::uint32_t other_children;
    std::uint32_t space : 24;
    std::uint32_t uses : 8;
    std::uint32_t slot : 22;
    std::uint32_t visits : 2;
    std::uint32_t flags : 8;

    bool has(std::uint32_t flag) const { return (flags & flag) == flag; }
    std::uint32_t own_children() const { return has(LEAF) ? 0 : below; }
};
static_assert(sizeof(Node) == 80);

/// More namespaces, or slots of an extent, than there are.
constexpr std::uint32_t MOST_SPACES = 1u << 24, MOST_SLOTS = 1u << 22;

/// Nodes in chunks: growing moves nothing, and wastes at most one chunk.
class Nodes {
public:
    Node& operator[](std::uint32_t n) { return chunks_[n >> SHIFT][n & (CHUNK - 1)]; }
    const Node& operator[](std::uint32_t n) const { return chunks_[n >> SHIFT][n & (CHUNK - 1)]; }

    std::uint32_t take() {
        std::uint32_t n;
        if (free_ != NONE) {
            n = free_;
            free_ = (*this)[n].parent;
        } else {
            if ((end_ & (CHUNK - 1)) == 0) chunks_.push_back(std::make_unique<Node[]>(CHUNK));
            n = end_++;
        }
        Node& node = (*this)[n];
        node = Node{};
        node.parent = node.place = NONE;
        return n;
    }

    void give(std::uint32_t n) {
        (*this)[n].flags = 0;
        (*this)[n].parent = free_;
        free_ = n;
    }

    /// One more than the largest number in use.
    std::uint32_t end() const { return end_; }
    std::size_t bytes() const { return chunks_.size() * CHUNK * sizeof(Node) + chunks_.capacity() * sizeof(void*); }

private:
    static constexpr std::uint32_t SHIFT = 12, CHUNK = 1u << SHIFT;
    std::vector<std::unique_ptr<Node[]>> chunks_;
    std::uint32_t end_ = 0;
    std::uint32_t free_ = NONE;
};

}  // namespace hicache::index
