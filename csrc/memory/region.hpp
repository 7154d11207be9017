// A tier in memory that processes share: pages in, pages out, and room made for more.
//
// Any process may be killed, or stopped for any time, between any two instructions, and neither harms nor holds up
// another one. So there is no lock between processes:
//
// - An extent has one owner that writes into it, from its first slot on and never the same place twice; the others read.
//   A page is there once its table word is, one compare-and-swap after its bytes. What a dead owner had not published
//   was never there; its extent is sealed by whoever needs room. Who is alive is asked of the kernel: each process holds
//   a lock on its own byte of a file.
// - To make room, the oldest sealed extent is claimed, and its generation grows before a byte of it is written again. A
//   reader copies the page out, verifies the copy, and looks at the generation again: changed means that the page has gone.
// - First in, first out with a second chance (CLOCK): pages that were used since they were stored are moved on, and where
//   they are most of an extent it stays as it is. What is new has a while to be used in. Who uses a page uses its
//   ancestors, so that what is kept has its beginning.
//
// Belongs here: the region. Does not belong here: where its memory comes from and who may have it (Python).
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/slot.hpp"
#include "memory/layout.hpp"

namespace hicache::memory {

/// What became of a page. The numbers are Python's (storage_backends.memory.backend).
enum class Verdict : std::uint8_t {
    kAbsent = 1,
    kValid = 2,    // read: in the caller's buffers, verified
    kChanged = 3,  // went while it was read: what the buffers hold is not a page
    kDamaged = 4,  // failed its verification, and is out of the table
    kStored = 5,
    kPresent = 6,  // write: was there already
    kNoRoom = 7,
};

/// 16 bytes of namespace and 32 of key.
using Identity = std::array<std::uint8_t, 48>;

struct Counts {
    std::uint64_t pages, bytes, free_extents;                       // of the region
    std::uint64_t evicted, kept, displaced, changed, damaged, takeovers;  // by this process
};

/// One process's hold on a region. Thread-safe. The memory outlives it.
class Region {
  public:
    /// Lays an empty region into zeroed memory of `geometry.file_bytes`.
    static void format(std::uint8_t* base, const Geometry& geometry) noexcept;

    /// Why memory of `length` bytes is no region of this version; empty when it is one.
    static std::string problem(const std::uint8_t* base, std::uint64_t length);

    /// base: a region without a problem. memory_fd: the same, to allocate it (-1: it is allocated). lock_fd: the file of
    /// the processes' locks, of which this one holds byte `owner` (below kMostOwners, not 0); -1: nobody else has it.
    Region(std::uint8_t* base, int memory_fd, int lock_fd, unsigned owner);

    /// Whether a page is there. touch: it counts as used, and so do its ancestors.
    bool has(const Identity& page, bool touch) noexcept;

    /// Copies a page into `buffers`, one of each of the shape's lengths, and verifies the copy.
    Verdict read(const io::SlotShape& shape, const Identity& page, std::span<std::uint8_t* const> buffers, bool used);

    /// Stores a page. header: as SlotHeaders of format.py writes it, checksums 0.
    Verdict write(const io::SlotShape& shape, const Identity& page, const std::uint8_t* header,
                  std::span<const std::uint8_t* const> buffers);

    bool remove(const Identity& page) noexcept;

    /// Forgets a namespace (16 bytes); how many pages that were.
    std::uint64_t clear(const std::uint8_t* name_space);

    /// Up to `most` of the pages that go next, without which a tenth of the extents would be free. Goes on where the
    /// last call ended, and begins anew after the last of them.
    std::vector<Identity> going(std::size_t most);

    std::uint64_t changes() const noexcept { return super_->changes.load(std::memory_order_acquire); }
    std::uint64_t extent_bytes() const noexcept { return extent_bytes_; }
    std::uint64_t extents() const noexcept { return extents_count_; }
    Counts counts() const noexcept;

    /// Seals what this process writes into: no write may follow.
    void retire();

  private:
    struct Found {
        std::atomic<Word>* at;
        Word word;
        Place place;
        std::uint8_t* slot;
    };
    struct Open {
        std::uint32_t extent;
        std::uint64_t generation;
        std::uint64_t next = 0;      // unit
        std::uint32_t writing = 0;   // pages on their way into it
        bool full = false;
    };

    std::atomic<Word>& control(std::uint32_t extent) noexcept { return extents_[extent].control; }
    std::atomic<std::uint8_t>& mark(const Place& place) noexcept;
    std::uint8_t* at(const Place& place) noexcept;
    bool current(const Place& place) noexcept;
    std::optional<Place> place_of(Word word) noexcept;
    std::atomic<Word>* bucket(const Identity& page, unsigned which) noexcept;
    std::optional<Found> find(const Identity& page) noexcept;
    std::atomic<Word>* word_of(const Identity& page, const Place& place) noexcept;
    Verdict publish(const Identity& page, const Place& place, std::uint64_t bytes) noexcept;
    void count_in(const Place& place, std::uint64_t bytes) noexcept;
    void count_out(const Place& place) noexcept;
    bool take_out(const Found& found) noexcept;
    std::uint64_t slot_bytes(const Place& place) noexcept;
    template <typename Each>
    void each_slot(std::uint32_t extent, std::uint64_t generation, std::uint64_t from, Each each);
    void touch(const Found& found) noexcept;

    std::optional<Place> allocate(std::uint64_t units);
    void written(const Place& place);
    bool open_another();
    std::optional<std::uint32_t> free_extent(std::uint64_t& left) noexcept;
    std::uint64_t turn_of(std::uint32_t extent) const noexcept;
    std::optional<std::uint32_t> claim_oldest() noexcept;
    std::optional<std::uint32_t> empty_oldest(bool keep);
    bool spared(std::uint32_t extent);
    void keep_used(std::uint32_t extent, std::uint64_t generation);
    void take_over_from_the_dead() noexcept;
    bool alive(unsigned owner) const noexcept;
    bool allocate_memory(std::uint32_t extent) noexcept;
    void seal(const Open& open) noexcept;

    // Copies of the superblock's numbers: what another process does to it moves no address of ours.
    std::uint8_t* const base_;
    Superblock* const super_;
    const std::uint64_t extent_bytes_, extents_count_, units_, buckets_;
    Extent* const extents_;
    std::atomic<Word>* const table_;
    std::atomic<std::uint8_t>* const marks_;
    std::uint8_t* const data_;
    const int memory_fd_, lock_fd_;
    const unsigned owner_;

    std::mutex mutex_;  // of this process's threads; guards what follows
    std::optional<Open> open_;
    std::vector<Open> full_;  // with pages on their way
    std::vector<bool> allocated_;
    std::uint64_t going_sequence_ = 0, going_unit_ = 0;
    std::atomic<std::uint64_t> evicted_{0}, kept_{0}, displaced_{0}, changed_{0}, damaged_{0}, takeovers_{0};
};

}  // namespace hicache::memory
