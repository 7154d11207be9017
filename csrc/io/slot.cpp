#include "io/slot.hpp"

#include <bit>
#include <cstring>

#include "checksum/crc32c.hpp"

namespace hicache::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian, and read in place");

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint64_t kChunk = 65536;
constexpr std::uint16_t kVersion = 1;
constexpr std::uint16_t kCrc32c = 1;
constexpr char kMagic[8] = {'H', 'I', 'C', 'S', 'L', 'O', 'T', '1'};

// Offsets in the slot header; the diagram is in format.py.
constexpr std::size_t kVersionAt = 8, kSizeAt = 12, kNamespaceAt = 16, kKeyAt = 32, kParentAt = 64,
                      kGenerationAt = 96, kTimeAt = 104, kPayloadAt = 112, kBuffersAt = 120, kChunksAt = 124, kChunkBytesAt = 128, kAlgorithmAt = 132, kPoolAt = 134,
                      kTokensAt = 136, kCrcAt = 140, kSaltAt = 160, kLoraAt = 162, kBodyAt = 192;

template <typename T>
T load(const std::uint8_t* at) noexcept {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <typename T>
void store(std::uint8_t* at, T value) noexcept {
    std::memcpy(at, &value, sizeof value);
}

std::uint64_t chunks_of(std::uint64_t length) noexcept { return length / kChunk + (length % kChunk != 0 ? 1 : 0); }

/// Calls each(crc) for every chunk in order, until it returns false; whether all were seen.
template <typename Each>
bool each_chunk(const SlotShape& shape, std::span<const std::uint8_t* const> payload, Each each) noexcept {
    const auto crc = checksum::active().function;
    for (std::size_t i = 0; i < shape.lengths.size(); ++i) {
        const std::uint8_t* data = payload[i];
        for (std::uint64_t left = shape.lengths[i]; left != 0;) {
            const std::uint64_t take = left < kChunk ? left : kChunk;
            if (!each(crc(data, take, 0))) return false;
            data += take;
            left -= take;
        }
    }
    return true;
}

/// CRC32C of the header with the field of the checksum itself as 0.
std::uint32_t header_crc(const std::uint8_t* header, std::uint64_t size) noexcept {
    constexpr std::uint8_t zero[4] = {};
    const auto crc = checksum::active().function;
    return crc(header + kCrcAt + 4, size - kCrcAt - 4, crc(zero, 4, crc(header, kCrcAt, 0)));
}

/// The header's size if it is a whole, unharmed header; else 0. It lies in `room` bytes.
std::uint64_t whole_header(const std::uint8_t* header, std::uint64_t room) noexcept {
    if (room < kBlock || std::memcmp(header, kMagic, sizeof kMagic) != 0) return 0;
    if (load<std::uint16_t>(header + kVersionAt) != kVersion) return 0;
    const std::uint64_t size = load<std::uint32_t>(header + kSizeAt);
    if (size < kBlock || size > room || size % kBlock != 0) return 0;
    if (header_crc(header, size) != load<std::uint32_t>(header + kCrcAt)) return 0;
    if (load<std::uint16_t>(header + kAlgorithmAt) != kCrc32c) return 0;
    if (load<std::uint32_t>(header + kChunkBytesAt) != kChunk) return 0;
    const std::uint64_t buffers = load<std::uint32_t>(header + kBuffersAt);
    const std::uint64_t chunks = load<std::uint32_t>(header + kChunksAt);
    const std::uint64_t end = kBodyAt + 8 * buffers + 4 * chunks + 4 * std::uint64_t{load<std::uint32_t>(header + kTokensAt)} +
                              load<std::uint16_t>(header + kPoolAt) + load<std::uint16_t>(header + kSaltAt) +
                              load<std::uint16_t>(header + kLoraAt);
    if (end > size) return 0;
    std::uint64_t payload = 0, counted = 0;
    for (std::uint64_t i = 0; i < buffers; ++i) {
        const auto length = load<std::uint64_t>(header + kBodyAt + 8 * i);
        if (__builtin_add_overflow(payload, length, &payload)) return 0;
        counted += chunks_of(length);
    }
    return payload == load<std::uint64_t>(header + kPayloadAt) && counted == chunks ? size : 0;
}

}  // namespace

std::uint64_t SlotShape::payload_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const auto length : lengths) sum += length;
    return sum;
}

bool SlotShape::fits() const noexcept {
    std::uint64_t need = kBodyAt, payload = 0;
    for (const auto length : lengths) {
        if (__builtin_add_overflow(payload, length, &payload)) return false;
        need += 8 + 4 * chunks_of(length);
        if (need > header_bytes) return false;
    }
    return header_bytes >= kBlock && header_bytes % kBlock == 0 && header_bytes <= UINT32_MAX;
}

std::uint64_t claimed_header_bytes(const std::uint8_t* header) noexcept {
    return std::memcmp(header, kMagic, sizeof kMagic) == 0 ? load<std::uint32_t>(header + kSizeAt) : 0;
}

bool describe(const std::uint8_t* header, std::uint64_t room, std::uint64_t slot_bytes, SlotPage& page) noexcept {
    const std::uint64_t size = whole_header(header, room);
    if (size == 0 || size > slot_bytes || load<std::uint64_t>(header + kPayloadAt) > slot_bytes - size) return false;
    page.generation = load<std::uint64_t>(header + kGenerationAt);
    page.time_ns = load<std::uint64_t>(header + kTimeAt);
    std::memcpy(page.name_space.data(), header + kNamespaceAt, page.name_space.size());
    std::memcpy(page.key.data(), header + kKeyAt, page.key.size());
    std::memcpy(page.parent.data(), header + kParentAt, page.parent.size());
    return true;
}

void seal(const SlotShape& shape, std::uint8_t* header, std::span<const std::uint8_t* const> payload) noexcept {
    std::uint8_t* at = header + checksums_at(shape);
    each_chunk(shape, payload, [&](std::uint32_t crc) {
        store(at, crc);
        at += 4;
        return true;
    });
    seal_header(shape, header);
}

void seal_header(const SlotShape& shape, std::uint8_t* header) noexcept {
    store(header + kCrcAt, header_crc(header, shape.header_bytes));
}

std::uint64_t checksums_at(const SlotShape& shape) noexcept { return kBodyAt + 8 * shape.lengths.size(); }

Verdict verify_header(const SlotShape& shape, const std::uint8_t* key, const std::uint8_t* header) noexcept {
    if (whole_header(header, shape.header_bytes) == 0) return Verdict::kDamaged;
    if (std::memcmp(header + kKeyAt, key, 32) != 0 ||
        std::memcmp(header + kNamespaceAt, shape.name_space.data(), shape.name_space.size()) != 0)
        return Verdict::kOtherPage;
    const std::size_t buffers = shape.lengths.size();
    const bool same = load<std::uint32_t>(header + kBuffersAt) == buffers &&
                      std::memcmp(header + kBodyAt, shape.lengths.data(), 8 * buffers) == 0;
    return same ? Verdict::kValid : Verdict::kDamaged;
}

Verdict verify(const SlotShape& shape, const std::uint8_t* key, const std::uint8_t* header,
               std::span<const std::uint8_t* const> payload, std::uint64_t moved) noexcept {
    if (moved < shape.header_bytes) return Verdict::kDamaged;
    const Verdict header_is = verify_header(shape, key, header);
    if (header_is != Verdict::kValid) return header_is;
    if (moved < shape.header_bytes + shape.payload_bytes()) return Verdict::kDamaged;
    const std::uint8_t* at = header + checksums_at(shape);
    const bool same = each_chunk(shape, payload, [&](std::uint32_t crc) {
        const bool equal = crc == load<std::uint32_t>(at);
        at += 4;
        return equal;
    });
    return same ? Verdict::kValid : Verdict::kDamaged;
}

}  // namespace hicache::io
