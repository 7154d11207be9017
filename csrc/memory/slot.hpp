// A page's slot in an extent: what its header says of it, read where it lies.
//
// A slot may be written anew while it is looked at: its extent was emptied and is another's now. So whoever looks reads
// through these functions, and asks afterwards whether the extent has still the generation that it had; what was read
// counts only then.
//
// Belongs here: reading. Does not belong here: the format (io/slot.hpp), or where slots are (region.hpp).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

// ThreadSanitizer is told of no race where the reader expects one. It would see those of library functions all the same.
#if defined(__SANITIZE_THREAD__)
#define HICACHE_MAY_RACE __attribute__((no_sanitize_thread, noinline))
#else
#define HICACHE_MAY_RACE
#endif

namespace hicache::memory {

/// 16 bytes of namespace and 32 of key.
using Identity = std::array<std::uint8_t, 48>;

// Of a slot's header: storage_backends/format.py has the diagram.
constexpr std::size_t kHeaderBytesAt = 12, kNamespaceAt = 16, kParentAt = 64, kPayloadAt = 112;

HICACHE_MAY_RACE inline void read_slot(void* to, const std::uint8_t* from, std::size_t length) noexcept {
#if defined(__SANITIZE_THREAD__)
    for (std::size_t i = 0; i < length; ++i) static_cast<volatile std::uint8_t*>(to)[i] = from[i];
#else
    std::memcpy(to, from, length);
#endif
}

template <typename T>
T load(const std::uint8_t* at) noexcept {
    T value;
    read_slot(&value, at, sizeof value);
    return value;
}

inline Identity identity_of(const std::uint8_t* slot) noexcept {
    Identity page;
    read_slot(page.data(), slot + kNamespaceAt, page.size());
    return page;
}

inline bool is_of(const std::uint8_t* slot, const Identity& page) noexcept {
#if defined(__SANITIZE_THREAD__)
    return identity_of(slot) == page;
#else
    return std::memcmp(slot + kNamespaceAt, page.data(), page.size()) == 0;
#endif
}

}  // namespace hicache::memory
