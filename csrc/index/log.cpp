// The residency log's records (storage_backends/local/residency.py has their layout), read and written in blocks.
//
// Belongs here: bytes to calls of the index and back. Does not belong here: files.
#include <cstring>

#include "checksum/crc32c.hpp"
#include "index/index.hpp"

namespace hicache::index {

namespace {

constexpr std::size_t AHEAD = 8;  // records whose place in the table is on its way
enum Kind : std::uint8_t { STORED = 1, REMOVED = 2, EXTENT_GONE = 3 };

struct Record {
    std::uint32_t crc;
    std::uint8_t kind;
    std::uint8_t zero[3];
    std::uint32_t extent;
    std::uint32_t slot;
    std::uint64_t generation;
    std::uint64_t time_ns;
    Digest space;
    std::uint8_t key[KEY_BYTES];
    std::uint8_t parent[KEY_BYTES];
    std::uint8_t rest[16];
};
static_assert(sizeof(Record) == RECORD_BYTES);

std::uint32_t checksum(const Record& record) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&record);
    return checksum::active().function(bytes + sizeof(record.crc), RECORD_BYTES - sizeof(record.crc), 0);
}

void apply(Index& index, std::uint32_t folder, const Record& record, Applied& applied) {
    const Key key = Key::from(record.key);
    switch (record.kind) {
        case STORED: {
            if (record.slot >= MOST_SLOTS) return;
            const std::uint32_t known = index.find(record.space, key);
            // Two writers stored the same page: one copy is enough to know of, while it may be used.
            if (known != NONE) {
                const Page there = index.page(known);
                if (there.folder != folder && (there.own || !index.expired(known))) return;
            }
            Page old;
            bool replaced;
            index.insert({record.space, key, Key::from(record.parent), folder, record.extent, record.slot,
                          record.generation, record.time_ns, false, 0}, false, &old, &replaced);
            return;
        }
        case REMOVED: {
            const std::uint32_t n = index.at(folder, record.extent, record.slot);
            if (n != NONE && n == index.find(record.space, key)) index.remove(n, false);
            return;
        }
        default:
            for (const std::uint32_t n : index.in_extent(folder, record.extent)) index.remove(n, false);
            applied.extents_gone.push_back(record.extent);
    }
}

}  // namespace

Applied apply_log(Index& index, std::uint32_t folder, std::span<const std::uint8_t> records, bool at_end) {
    Applied applied;
    for (; applied.bytes + RECORD_BYTES <= records.size(); applied.bytes += RECORD_BYTES) {
        Record record;
        if (applied.bytes + (AHEAD + 1) * RECORD_BYTES <= records.size()) {
            std::memcpy(&record, &records[applied.bytes + AHEAD * RECORD_BYTES], RECORD_BYTES);
            index.prefetch(record.space, Key::from(record.key));
        }
        std::memcpy(&record, &records[applied.bytes], RECORD_BYTES);
        if (record.crc == checksum(record) && record.kind >= STORED && record.kind <= EXTENT_GONE) {
            apply(index, folder, record, applied);
            continue;
        }
        if (at_end && applied.bytes + 2 * RECORD_BYTES > records.size()) return applied;
        ++applied.damaged;
    }
    return applied;
}

namespace {

void write(const Page& page, Kind kind, const Key& parent, std::uint64_t time_ns, std::uint8_t* out) {
    Record record{};
    record.kind = kind;
    record.extent = page.extent;
    record.slot = page.slot;
    record.generation = page.generation;
    record.time_ns = time_ns;
    record.space = page.space;
    std::memcpy(record.key, page.key.words.data(), KEY_BYTES);
    std::memcpy(record.parent, parent.words.data(), KEY_BYTES);
    record.crc = checksum(record);
    std::memcpy(out, &record, RECORD_BYTES);
}

}  // namespace

void write_stored(const Page& page, std::uint8_t* out) { write(page, STORED, page.parent, page.time_ns, out); }

void write_removed(const Page& page, std::uint64_t time_ns, std::uint8_t* out) {
    write(page, REMOVED, Key{}, time_ns, out);
}

}  // namespace hicache::index
