// What the engine is given and what it gives back: batches of pages, and their ends.
//
// Belongs here: plain data. Does not belong here: rings, threads, or what a slot's bytes mean (slot.hpp).
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "io/slot.hpp"

namespace hicache::io {

/// One contiguous span of a file, to or from a run of the batch's buffers.
struct Page {
    int fd = -1;
    bool write = false;
    std::uint32_t first = 0;  // of its buffers in Batch::buffers
    std::uint32_t count = 0;
    std::uint64_t offset = 0;
    std::uint64_t file = 0;  // a number that is given to no other open file, ever: it may be registered. 0: may not
    const std::uint8_t* cancelled = nullptr;  // a byte that the caller sets when the page need not begin any more
};

/// What the pages hold, where they are slots: a header, then the buffers of `shape`.
struct Slots {
    SlotShape shape;
    std::vector<std::uint8_t> keys;  // 32 bytes a page
    /// Empty: the payload is buffers 1.. of the page. Else the page is one bounce buffer that holds header and
    /// payload, and this is where the payload comes from or goes to: an address per page and buffer.
    std::vector<std::uint8_t*> copies;
};

struct Batch {
    std::uint64_t token = 0;
    std::vector<Page> pages;
    std::vector<iovec> buffers;
    std::optional<Slots> slots;
    std::uint32_t open = 0;  // pages that have no end yet; the engine's, under its lock

    /// A page in a ring's hands; the batch lives as long as one of its pages does.
    struct Item {
        std::shared_ptr<Batch> batch;
        std::uint32_t page = 0;

        const Page& operator*() const noexcept { return batch->pages[page]; }
        const Page* operator->() const noexcept { return &batch->pages[page]; }
    };
};

/// The end of one page. moved: bytes, or -errno.
struct Ended {
    std::uint64_t token;
    std::int64_t moved;
    std::uint32_t page;
    Verdict verdict;
};

}  // namespace hicache::io
