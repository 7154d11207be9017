// Pages between a region and memory that the CPU does not copy to: a device's, by a mover.
//
//   read    find the pages, take their checksums from their headers; have them copied out of where they lie, with the
//           checksums of what arrived; compare; look whether each page's extent has still the generation it had
//   write   prepare: a place for each page, in an extent that stays open meanwhile. Have the payloads copied there, with
//           their checksums; then commit: the header, and the page's word in the table. Or abort: nothing is left but room
//           that is nobody's, until its extent is emptied
//
// This is the protocol of all readers (region.hpp), with a device as the copier. A page that is served is the page that
// was asked for, since: whoever empties an extent raises its generation, and that is seen by everybody before it writes
// the first byte anew (a full fence stands between). A device's reads of host memory are coherent with the CPU's caches.
// So a copy that got one byte of another page was made after the generation had grown; the mover returns after the copy;
// and the generation is read after that. And a page that arrived changed on its way has another checksum.
//
// What a mover writes is there before it returns, so before the page's word. A process that dies in between leaves an
// extent without those words, and its copies end with it, as the kernel takes it apart. A byte that still came after the
// extent had been taken over would be another page's damage, which its checksums find: a miss.
//
// Belongs here: many pages at once. Does not belong here: pages that the CPU copies (pages.cpp), or places (room.cpp).
#include <algorithm>
#include <cstring>

#include "memory/mover.hpp"
#include "memory/region.hpp"

namespace hicache::memory {
namespace {

constexpr std::uint64_t kChunk = 65536;

/// The chunks of a page's buffers, one after the other; and its pieces, of which those that touch are one.
class Work {
  public:
    explicit Work(const io::SlotShape& shape) : shape_(shape) {}

    void add(const std::uint8_t* payload, const std::uint64_t* buffers, bool out) {
        auto in_region = reinterpret_cast<std::uint64_t>(payload);
        bool first = true;
        for (std::size_t i = 0; i < shape_.lengths.size(); ++i) {
            const std::uint64_t length = shape_.lengths[i], there = buffers[i];
            for (std::uint64_t at = 0; at < length; at += kChunk) {
                addresses_.push_back(there + at);
                lengths_.push_back(static_cast<std::uint32_t>(std::min(kChunk, length - at)));
            }
            const Piece piece = out ? Piece{there, in_region, length} : Piece{in_region, there, length};
            if (!first && pieces_.back().to + pieces_.back().bytes == piece.to &&
                pieces_.back().from + pieces_.back().bytes == piece.from)
                pieces_.back().bytes += length;
            else if (length != 0)
                pieces_.push_back(piece), first = false;
            in_region += length;
        }
    }

    /// written: to the region.
    std::string move(const Mover& mover, bool written) {
        crcs_.assign(addresses_.size(), 0);
        const Chunks chunks{addresses_.data(), lengths_.data(), crcs_.data(), addresses_.size(), written};
        char why[256] = {};
        if (mover.move(mover.self, pieces_.data(), pieces_.size(), &chunks, why, sizeof why) == 0) return {};
        return why[0] != 0 ? why : "no reason given";
    }

    /// Of the page that was added as number `page`.
    const std::uint32_t* crcs(std::size_t page) const { return crcs_.data() + page * of_page(); }
    std::size_t of_page() const {
        std::size_t count = 0;
        for (const auto length : shape_.lengths) count += (length + kChunk - 1) / kChunk;
        return count;
    }

  private:
    const io::SlotShape& shape_;
    std::vector<Piece> pieces_;
    std::vector<std::uint64_t> addresses_;
    std::vector<std::uint32_t> lengths_, crcs_;
};

}  // namespace

std::string Region::read_by(const Mover& mover, const io::SlotShape& shape, std::span<const Identity> pages,
                            const std::uint64_t* buffers, bool used, std::span<Verdict> verdicts) {
    struct Located {
        std::size_t number;
        Found found;
    };
    std::vector<Located> located;
    Work work(shape);
    const std::size_t of_page = work.of_page();
    std::vector<std::uint32_t> wanted;
    std::vector<std::uint8_t> header(shape.header_bytes);
    for (std::size_t i = 0; i < pages.size(); ++i) {
        verdicts[i] = Verdict::kUnknown;
        const auto found = find(pages[i]);
        if (!found) {
            verdicts[i] = Verdict::kAbsent;
        } else if (!header_of(shape, pages[i], *found, header.data())) {
            verdicts[i] = judge(*found, false, used);
        } else {
            const std::uint8_t* sums = header.data() + io::checksums_at(shape);
            wanted.resize(wanted.size() + of_page);
            std::memcpy(wanted.data() + wanted.size() - of_page, sums, of_page * sizeof(std::uint32_t));
            work.add(found->slot + shape.header_bytes, buffers + i * shape.lengths.size(), true);
            located.push_back({i, *found});
        }
    }
    if (located.empty()) return {};
    if (std::string why = work.move(mover, false); !why.empty()) return why;
    for (std::size_t page = 0; page < located.size(); ++page) {
        const bool same = std::equal(work.crcs(page), work.crcs(page) + of_page, wanted.data() + page * of_page);
        verdicts[located[page].number] = judge(located[page].found, same, used);
    }
    return {};
}

/// Places of pages on their way. What is not committed is aborted with this: its room is nobody's.
class Region::Prepared {
  public:
    Prepared(Region& region, std::size_t most) : region_(region) { pages.reserve(most); }
    ~Prepared() {
        for (; ended_ < pages.size(); ++ended_) region_.written(pages[ended_].place);
    }
    Prepared(const Prepared&) = delete;
    Prepared& operator=(const Prepared&) = delete;

    bool add(std::size_t number, std::uint64_t units) {
        const auto place = region_.allocate(units);
        if (place) pages.push_back({number, *place});  // there is room: nothing fails with a place in hand
        return place.has_value();
    }

    /// The next of them, whose bytes are there: header and all.
    Verdict commit(const Identity& page, std::uint64_t bytes) {
        const Place place = pages[ended_++].place;
        const Verdict verdict = region_.publish(page, place, bytes);
        region_.written(place);
        return verdict;
    }

    struct Page {
        std::size_t number;
        Place place;
    };
    std::vector<Page> pages;

  private:
    Region& region_;
    std::size_t ended_ = 0;
};

std::string Region::write_by(const Mover& mover, const io::SlotShape& shape, std::span<const Identity> pages,
                             const std::uint8_t* headers, const std::uint64_t* buffers, std::span<Verdict> verdicts) {
    const std::uint64_t bytes = shape.header_bytes + shape.payload_bytes();
    std::vector<std::uint8_t> sealed(shape.header_bytes);
    std::fill(verdicts.begin(), verdicts.end(), Verdict::kUnknown);
    for (std::size_t next = 0; next < pages.size();) {
        Prepared prepared(*this, pages.size() - next);
        Work work(shape);
        for (; next < pages.size(); ++next) {
            if (const auto found = find(pages[next])) {
                touch(*found);
                verdicts[next] = Verdict::kPresent;
            } else if (prepared.add(next, (bytes + kUnit - 1) / kUnit)) {
                work.add(at(prepared.pages.back().place) + shape.header_bytes, buffers + next * shape.lengths.size(), false);
            } else if (prepared.pages.empty()) {
                verdicts[next] = Verdict::kNoRoom;
            } else {
                break;  // what is on its way may be what holds the extents: there may be room after it
            }
        }
        if (prepared.pages.empty()) break;
        if (std::string why = work.move(mover, true); !why.empty()) return why;
        for (std::size_t page = 0; page < prepared.pages.size(); ++page) {
            const auto [number, place] = prepared.pages[page];
            std::memcpy(sealed.data(), headers + number * shape.header_bytes, shape.header_bytes);
            std::memcpy(sealed.data() + io::checksums_at(shape), work.crcs(page), work.of_page() * sizeof(std::uint32_t));
            io::seal_header(shape, sealed.data());
            std::memcpy(at(place), sealed.data(), shape.header_bytes);
            verdicts[number] = prepared.commit(pages[number], bytes);
        }
    }
    return {};
}

}  // namespace hicache::memory
