// Checksums without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: that every implementation this CPU can run reads exactly the bytes it is given, whatever their
// alignment, from many threads at once, and says what the definition says.
#include "checksum/crc32c.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "test/check.hpp"

namespace {

/// The definition: a bit at a time, polynomial 0x1EDC6F41 reflected.
std::uint32_t defined(const std::uint8_t* data, std::size_t length, std::uint32_t seed) {
    std::uint32_t crc = ~seed;
    for (std::size_t i = 0; i < length; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

void all_agree(unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::size_t> lengths;
    for (std::size_t length = 0; length < 300; ++length) lengths.push_back(length);
    for (const std::size_t length : {4095, 4096, 4097, 65535, 65536, 70001}) lengths.push_back(length);
    for (const std::size_t length : lengths) {
        const std::size_t offset = random() % 64;
        // To the end of its allocation, so that a byte too many is seen.
        const auto memory = std::make_unique<std::uint8_t[]>(offset + length);
        std::uint8_t* data = memory.get() + offset;
        std::generate_n(data, length, [&] { return static_cast<std::uint8_t>(random()); });
        const std::uint32_t before = length % 2 ? random() : 0, expected = defined(data, length, before);
        const std::size_t cut = length ? random() % length : 0;
        for (const auto& each : hicache::checksum::implementations()) {
            CHECK(each.function(data, length, before) == expected);
            CHECK(each.function(data + cut, length - cut, each.function(data, cut, before)) == expected);
        }
    }
}

}  // namespace

int main() {
    CHECK(defined(reinterpret_cast<const std::uint8_t*>("123456789"), 9, 0) == 0xE3069283u);  // RFC 3720, B.4
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 3; ++i) threads.emplace_back(all_agree, i);
    for (auto& thread : threads) thread.join();
    for (const auto& each : hicache::checksum::implementations()) std::printf("checksum: %s ok\n", each.name);
}
