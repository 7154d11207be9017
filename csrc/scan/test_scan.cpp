// The header scan without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: what memory and threads can get wrong (headers that lie about their size, a file that ends inside one,
// many readers, an end in the middle). What headers mean is tested from Python, against a second implementation.
#include "scan/scan.hpp"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "checksum/crc32c.hpp"
#include "test/check.hpp"

using namespace hicache::scan;

namespace {

constexpr std::uint64_t kBase = 4096, kSlot = 16384, kPayload = 5000;

void put(std::uint8_t* at, std::uint64_t value, std::size_t bytes) { std::memcpy(at, &value, bytes); }

/// A whole header of `size` bytes for a page that the slot's number names.
std::vector<std::uint8_t> header(std::uint32_t slot, std::size_t size) {
    std::vector<std::uint8_t> made(size, 0);
    std::memcpy(made.data(), "HICSLOT1", 8);
    put(made.data() + 8, 1, 2);
    put(made.data() + 12, size, 4);
    std::memset(made.data() + 16, 7, 16);
    put(made.data() + 32, slot, 4);
    put(made.data() + 96, 1000 + slot, 8);
    put(made.data() + 112, kPayload, 8);
    put(made.data() + 120, 1, 4);
    put(made.data() + 124, 1, 4);
    put(made.data() + 128, 65536, 4);
    put(made.data() + 132, 1, 2);
    put(made.data() + 192, kPayload, 8);
    put(made.data() + 140, hicache::checksum::active().function(made.data(), size, 0), 4);
    return made;
}

struct File {
    File() {
        char path[] = "scan-test-XXXXXX";
        fd = mkstemp(path);
        CHECK(fd >= 0);
        unlink(path);
    }
    ~File() { close(fd); }
    void write(std::uint32_t slot, const std::vector<std::uint8_t>& bytes) const {
        CHECK(pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(kBase + slot * kSlot)) ==
              static_cast<ssize_t>(bytes.size()));
    }
    int fd;
};

void finds_what_is_whole(unsigned threads) {
    const File file;
    std::vector<std::uint32_t> slots, expected;
    for (std::uint32_t slot = 0; slot < 200; ++slot) {
        auto bytes = header(slot, slot % 3 == 0 ? 8192 : 4096);
        const bool damaged = slot % 5 == 4;
        if (damaged) bytes[bytes.size() - 1 - slot] ^= 1;
        if (slot == 199) bytes.resize(3000);  // the file ends in it
        file.write(slot, bytes);
        slots.push_back(199 - slot);
        if (!damaged && slot != 199) expected.insert(expected.begin(), slot);
    }
    slots.push_back(100000);  // behind the file's end
    const auto found = headers(file.fd, kBase, kSlot, slots, threads, nullptr);
    CHECK(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
        CHECK(found[i].slot == expected[i]);
        CHECK(found[i].page.generation == 1000 + expected[i]);
        CHECK(std::memcmp(found[i].page.key.data(), &expected[i], 4) == 0);
    }
    CHECK(headers(file.fd, kBase, kSlot, {}, threads, nullptr).empty());
    CHECK(headers(-1, kBase, kSlot, slots, threads, nullptr).empty());
}

void reads_any_bytes(unsigned threads) {
    const File file;
    std::mt19937_64 random(11);
    std::vector<std::uint32_t> slots;
    for (std::uint32_t slot = 0; slot < 400; ++slot) {
        auto bytes = header(slot, 4096 << random() % 2);
        for (int k = 0; k < 3; ++k)
            bytes[random() % 200] = static_cast<std::uint8_t>(random() % 3 == 0 ? 0xFF : random());
        const std::uint64_t sizes[] = {0, 4095, 4097, 8192, 12288, kSlot, kSlot + 4096, 1u << 31, UINT32_MAX};
        put(bytes.data() + 12, sizes[random() % 9], 4);
        put(bytes.data() + 140, 0, 4);
        std::memcpy(bytes.data(), "HICSLOT1", 8);
        // Resealed, so that the checks behind the checksum are reached.
        put(bytes.data() + 140, hicache::checksum::active().function(bytes.data(), bytes.size(), 0), 4);
        file.write(slot, bytes);
        slots.push_back(slot);
    }
    headers(file.fd, kBase, kSlot, slots, threads, nullptr);
}

void ends_when_told(unsigned threads) {
    const File file;
    std::vector<std::uint32_t> slots;
    for (std::uint32_t slot = 0; slot < 64; ++slot) file.write(slot, header(slot, 8192));
    for (std::uint32_t i = 0; i < 65536; ++i) slots.push_back(i % 64);
    std::uint8_t cancelled = 0;
    std::thread canceller([&] {
        usleep(2000);
        __atomic_store_n(&cancelled, 1, __ATOMIC_RELEASE);
    });
    const auto found = headers(file.fd, kBase, kSlot, slots, threads, &cancelled);
    canceller.join();
    for (const Found& one : found) CHECK(one.page.generation == 1000 + one.slot);
    CHECK(headers(file.fd, kBase, kSlot, slots, threads, &cancelled).empty());
}

}  // namespace

int main() {
    for (const unsigned threads : {1u, 8u}) {
        finds_what_is_whole(threads);
        reads_any_bytes(threads);
        ends_when_told(threads);
    }
    std::puts("scan: ok");
}
