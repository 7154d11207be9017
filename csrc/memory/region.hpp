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
//   region.cpp  what a new region is, and one that is there already     pages.cpp  pages in, out, gone
//   table.cpp   which page is where                                      room.cpp   extents opened, sealed, emptied
//   past.cpp    pages in and out that a device copies
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
#include "memory/mover.hpp"
#include "memory/slot.hpp"
#include "memory/supply.hpp"

namespace hicache::memory {

/// What became of a page. The numbers are Python's (storage_backends.memory.backend).
enum class Verdict : std::uint8_t {
    kUnknown = 0,  // it could not be tried
    kAbsent = 1,
    kValid = 2,    // read: in the caller's buffers, verified
    kChanged = 3,  // went while it was read: what the buffers hold is not a page
    kDamaged = 4,  // failed its verification, and is out of the table
    kStored = 5,
    kPresent = 6,  // write: was there already
    kNoRoom = 7,
};

constexpr int kMostTries = 16;  // at what somebody else was faster with

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

    /// base: a region without a problem. memory_fd: the same, to allocate it (-1: memory without a file). lock_fd: the
    /// file of the processes' locks, of which this one holds byte `owner` (below kMostOwners, not 0); -1: nobody else.
    Region(std::uint8_t* base, int memory_fd, int lock_fd, unsigned owner);

    /// Whether a page is there. touch: it counts as used, and so do its ancestors.
    bool has(const Identity& page, bool touch) noexcept;

    /// Copies a page into `buffers`, one of each of the shape's lengths, and verifies the copy.
    Verdict read(const io::SlotShape& shape, const Identity& page, std::span<std::uint8_t* const> buffers, bool used);

    /// Stores a page. header: as SlotHeaders of format.py writes it, checksums 0.
    Verdict write(const io::SlotShape& shape, const Identity& page, const std::uint8_t* header,
                  std::span<const std::uint8_t* const> buffers);

    /// As read, for memory that `mover` copies to. buffers: as many addresses for each page as the shape has lengths. Why
    /// it could not copy, empty when it could: what is kUnknown is none of the pages' fault then.
    std::string read_by(const Mover& mover, const io::SlotShape& shape, std::span<const Identity> pages,
                        const std::uint64_t* buffers, bool used, std::span<Verdict> verdicts);

    /// As write, for memory that `mover` copies from. headers: one after the other.
    std::string write_by(const Mover& mover, const io::SlotShape& shape, std::span<const Identity> pages,
                         const std::uint8_t* headers, const std::uint64_t* buffers, std::span<Verdict> verdicts);

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

    /// Takes at most `step` more bytes of memory for the extents that are opened next, so that `ahead` bytes of them are
    /// there before a page needs them; false: they are, or there is no more. For one thread at a time.
    bool prepare(std::uint64_t ahead, std::uint64_t step) noexcept;

    /// Takes all memory of one extent, as for the first page in it; false: there is not enough.
    bool take(std::uint32_t extent) noexcept { return supply_.take(extent); }

    /// How many extents this process has opened: after each of them `prepare` may have something to do.
    std::uint64_t opened() const noexcept { return opened_.load(std::memory_order_relaxed); }

    /// Seals what this process writes into: no write may follow.
    void retire();

  private:
    struct Found {
        std::atomic<Word>* at;
        Word word;
        Place place;
        std::uint8_t* slot;
    };
    class Prepared;
    struct Open {
        std::uint32_t extent;
        std::uint64_t generation;
        std::uint64_t next = 0;      // unit
        std::uint32_t writing = 0;   // pages on their way into it
    };

    std::atomic<Word>& control(std::uint32_t extent) noexcept { return extents_[extent].control; }
    std::atomic<std::uint8_t>& mark(const Place& place) noexcept;
    std::uint8_t* at(const Place& place) noexcept;
    bool current(const Place& place) noexcept;
    std::optional<Place> place_of(Word word) noexcept;
    std::atomic<Word>* bucket(const Identity& page, unsigned which) noexcept;
    std::optional<Found> find(const Identity& page) noexcept;
    static Word word_for(const Identity& page, const Place& place) noexcept;
    std::atomic<Word>* word_of(const Identity& page, const Place& place) noexcept;
    bool header_of(const io::SlotShape& shape, const Identity& page, const Found& found, std::uint8_t* header) noexcept;
    Verdict judge(const Found& found, bool good, bool used) noexcept;
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
    void seal(const Open& open) noexcept;

    // Copies of the superblock's numbers: what another process does to it moves no address of ours.
    std::uint8_t* const base_;
    Superblock* const super_;
    const std::uint64_t extent_bytes_, extents_count_, units_, buckets_;
    Extent* const extents_;
    std::atomic<Word>* const table_;
    std::atomic<std::uint8_t>* const marks_;
    std::uint8_t* const data_;
    const int lock_fd_;
    const unsigned owner_;
    Supply supply_;
    std::atomic<std::uint64_t> opened_{0};

    std::mutex mutex_;  // of this process's threads; guards what follows
    std::optional<Open> open_;
    std::vector<Open> full_;  // with pages on their way
    std::uint64_t going_sequence_ = 0, going_unit_ = 0;
    std::atomic<std::uint64_t> evicted_{0}, kept_{0}, displaced_{0}, changed_{0}, damaged_{0}, takeovers_{0};
};

/// Calls each(place, mark) for the slots of an extent from unit `from` on, until it returns false.
template <typename Each>
void Region::each_slot(std::uint32_t extent, std::uint64_t generation, std::uint64_t from, Each each) {
    const auto* marks = reinterpret_cast<const std::uint8_t*>(marks_ + std::uint64_t{extent} * units_);
    for (std::uint64_t unit = from; unit < units_; ++unit) {
        while (unit % 8 == 0 && unit + 8 <= units_ && load<std::uint64_t>(marks + unit) == 0) unit += 8;
        if (unit >= units_) return;
        const Place place{extent, static_cast<std::uint32_t>(unit), generation};
        if (const auto is = static_cast<Mark>(mark(place).load(std::memory_order_acquire)); is != Mark::kNone)
            if (!each(place, is)) return;
    }
}

}  // namespace hicache::memory
