// The index of the local tier, as storage_backends/local/index.py describes it: same calls, same answers.
//
// Belongs here: pages by key and by place, chains, reads under way. Does not belong here: Python (module.cpp), which
// leaf goes next (order.hpp), what log records look like (log.cpp). Not thread-safe: the backend holds one lock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "index/node.hpp"
#include "index/order.hpp"
#include "index/page.hpp"
#include "index/pins.hpp"
#include "index/table.hpp"

namespace hicache::index {

class Index {
public:
    explicit Index(Policy policy) : policy_(policy), table_(nodes_), pins_(nodes_) {}
    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;

    std::size_t size() const { return resident_; }
    std::size_t bytes() const;

    /// The page of this key, past its time or not; NONE when it is not resident.
    std::uint32_t find(const Digest& space, const Key& key) const;
    std::uint32_t at(std::uint32_t folder, std::uint32_t extent, std::uint32_t slot) const;
    Page page(std::uint32_t n) const;
    bool expired(std::uint32_t n) const { return nodes_[n].seconds < spaces_[nodes_[n].space]->expiry; }

    /// Nodes of packed keys, NONE for absent ones and those past their time. With `parents`, pages that have none learn theirs.
    void lookup(const Digest& space, std::span<const std::uint8_t> keys, const std::uint8_t* parents, Numbers& found);
    /// Mark these pages (NONE is passed over) and their known ancestors as used.
    void touch(const Digest& space, std::span<const std::uint32_t> nodes, bool used);
    void link(std::uint32_t n, const Key& parent);

    /// A page of this key is about to be asked for.
    void prefetch(const Digest& space, const Key& key) const {
        const std::uint32_t number = known_space(space);
        if (number != NONE) table_.prefetch(Table::hash(number, key));
    }

    /// The node; `old`: the page that it took the place of, if it was resident.
    std::uint32_t insert(const Page& page, bool oldest, Page* old, bool* replaced);
    void remove(std::uint32_t n, bool evicted);

    /// Reads under way. `pins().take` holds a page.
    Pins& pins() { return pins_; }
    /// The page of a handle, resident or not.
    Page pinned(std::uint32_t handle);

    void protect(const Digest& space, std::span<const std::uint8_t> keys);
    std::uint32_t victim(const Digest& space);
    /// Up to `count` victims, removed; as they were.
    std::vector<Page> evict(const Digest& space, std::size_t count, std::span<const std::uint8_t> protected_keys);
    /// Up to `count` pages that would be evicted next (Order::going), without those past their time.
    Numbers going(const Digest& space, std::size_t count, std::size_t examine);
    /// Whether the index holds this very page, in this place.
    std::uint32_t same(const Page& page) const;

    /// Pages stored before this moment are past their time.
    void set_oldest(const Digest& space, std::uint64_t time_ns) { spaces_[space_number(space)]->expiry = time_ns / SECOND; }
    /// Own pages that are past it; goes on where the last call stopped and looks at so many pages.
    Numbers expired(const Digest& space, std::size_t limit, std::size_t examine);

    void set_capacity(const Digest& space, std::uint64_t pages) { spaces_[space_number(space)]->order.set_capacity(pages); }
    /// When pages of the namespace were touched last; 0: never, or it holds none.
    std::uint64_t touched(const Digest& space) const;

    Numbers ancestors(const Digest& space, const Key& key);
    /// Own pages that hang below evicted ones, of those that are not in use; looks at so many nodes.
    Numbers find_orphans(std::size_t limit, std::size_t examine);
    /// Own pages whose parent was evicted before them.
    std::size_t orphans() const { return orphans_; }
    Numbers in_extent(std::uint32_t folder, std::uint32_t extent) const;
    Numbers in_folder(std::uint32_t folder) const;
    Numbers used_slots(std::uint32_t folder, std::uint32_t extent) const;
    Numbers extents(std::uint32_t folder) const;
    /// The highest rank of an extent's own pages, with its tie; the lowest number there is when it has none.
    std::pair<std::int64_t, std::uint32_t> last_used(std::uint32_t folder, std::uint32_t extent) const;
    std::uint64_t newest_generation(std::uint32_t folder, std::uint32_t extent) const;
    Snapshot snapshot(std::uint32_t folder) const { return capture(true, folder); }
    /// The same of all own pages, whatever their folder.
    Snapshot snapshot() const { return capture(false, 0); }
    /// Whether a page of the snapshot is still where it was.
    bool still_there(const Snapshot& snapshot, const Captured& page) const {
        const Node& node = nodes_[page.node];
        return node.has(RESIDENT | OWN) && node.generation == page.generation && node.space == page.space &&
               places_[node.place].folder == snapshot.folder;
    }

    /// Look at so many nodes for pages of the folders that become ours; whether there are no more. None may come into
    /// these folders from now on but own ones.
    bool gather(Adoption& adoption, std::size_t examine) const;
    /// Make so many of them own pages, in their order; whether there are no more. Those that went since are passed over.
    bool adopt(Adoption& adoption, std::size_t count);

private:
    struct Space {
        Space(const Digest& name, Policy policy, Nodes& nodes) : digest(name), order(policy, nodes) {}
        Digest digest;
        Order order;
        std::uint64_t touched = 0;
        std::size_t pages = 0;
        std::uint64_t expiry = 0;  // seconds
        std::pair<std::uint32_t, std::uint32_t> swept_place{0, 0};  // where `expired` goes on
        std::uint32_t swept_slot = 0;
    };
    struct Place {
        std::uint32_t folder;
        std::uint32_t extent;
        std::uint32_t pages = 0;
        Numbers slots;
        // No page was stored before this second.
        std::uint64_t stored_from = NEVER;
        // The namespace that began last to look through the extent, and the same of what was seen or came since then.
        std::uint64_t seen_from = NEVER;
        std::uint32_t seen_by = NONE;

        void see(std::uint64_t seconds) { seen_from = std::min(seen_from, seconds); }
    };
    static constexpr std::uint64_t NEVER = ~std::uint64_t{0}, SECOND = 1'000'000'000;
    struct DigestHash {
        std::size_t operator()(const Digest& digest) const {
            std::size_t h;
            std::memcpy(&h, digest.data(), sizeof(h));
            return h;
        }
    };

    std::uint32_t space_number(const Digest& digest);
    std::uint32_t known_space(const Digest& digest) const;
    std::uint32_t known_place(std::uint32_t folder, std::uint32_t extent) const;
    std::uint32_t place_number(std::uint32_t folder, std::uint32_t extent);
    std::uint32_t find_or_make(std::uint32_t space, const Key& key);
    void set_parent(std::uint32_t n, const Key& parent);
    void add_child(std::uint32_t parent, bool own);
    void drop_child(std::uint32_t parent, bool own);
    void drop_if_unnamed(std::uint32_t n);
    void lift(std::uint32_t n);
    Snapshot capture(bool one, std::uint32_t folder) const;
    std::uint64_t hash(const Node& node) const { return Table::hash(node.space, node.key); }
    Order& order(const Node& node) { return spaces_[node.space]->order; }

    Policy policy_;
    Nodes nodes_;
    Table table_;
    std::size_t resident_ = 0;
    std::uint64_t clock_ = 0;
    std::vector<std::unique_ptr<Space>> spaces_;
    std::unordered_map<Digest, std::uint32_t, DigestHash> space_numbers_;
    std::vector<Place> places_;
    Numbers free_places_;
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint32_t> place_numbers_;
    Pins pins_;
    std::size_t orphans_ = 0;
    // The search for orphans goes up and down: parents lie before their children or, after a start from a log, behind.
    std::uint32_t sweep_at_ = 0;
    bool sweep_up_ = true;
    // What was asked for last, which is what is asked for next: batches have one namespace, logs go extent by extent.
    mutable std::uint32_t last_space_ = NONE;
    mutable std::uint32_t last_place_ = NONE;
    Numbers protected_;
    Numbers walk_;
    std::vector<std::uint64_t> hashes_;
};

/// What became of a piece of a residency log.
struct Applied {
    std::size_t bytes = 0;  // taken; less than given when the last record may still be on its way
    std::size_t damaged = 0;
    Numbers extents_gone;
};

/// Bring the index up to date with log records of a folder. at_end: the piece ends where the file does.
Applied apply_log(Index& index, std::uint32_t folder, std::span<const std::uint8_t> records, bool at_end);

constexpr std::size_t RECORD_BYTES = 128;

/// One record of that size to `out`.
void write_stored(const Page& page, std::uint8_t* out);
void write_removed(const Page& page, std::uint64_t time_ns, std::uint8_t* out);

}  // namespace hicache::index
