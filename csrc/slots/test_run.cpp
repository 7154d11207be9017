// Runs of slots without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: what memory and threads can get wrong (pages in one piece and in a thousand, a file that ends inside one,
// a disk that is full, threads side by side). What a slot's bytes mean is tested from Python.
#include "slots/run.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "test/check.hpp"

using namespace hicache;
using slots::Run;

namespace {

constexpr std::uint64_t kBlock = 4096;
constexpr auto kValid = static_cast<std::uint8_t>(io::Verdict::kValid);
constexpr auto kOtherPage = static_cast<std::uint8_t>(io::Verdict::kOtherPage);
constexpr auto kDamaged = static_cast<std::uint8_t>(io::Verdict::kDamaged);

void put(std::uint8_t* at, std::uint64_t value, std::size_t bytes) { std::memcpy(at, &value, bytes); }

struct File {
    File() : fd(memfd_create("run-test", 0)) { CHECK(fd >= 0); }
    ~File() { close(fd); }
    int fd;
};

/// Pages with memory of their own for every buffer, so that a step past the end of one is found.
struct Pages {
    Pages(std::size_t count, std::vector<std::uint64_t> lengths, bool with_pad) {
        std::uint64_t chunks = 0;
        for (const auto length : lengths) chunks += (length + 65535) / 65536;
        run.shape.lengths = std::move(lengths);
        run.shape.name_space.fill(7);
        run.shape.header_bytes = (192 + 8 * run.shape.lengths.size() + 4 * chunks + kBlock - 1) / kBlock * kBlock;
        CHECK(run.shape.fits());
        run.slot_bytes = (run.shape.header_bytes + run.shape.payload_bytes() + kBlock - 1) / kBlock * kBlock;
        run.stride = run.shape.header_bytes;
        headers.resize(count * run.stride);
        run.headers = headers.data();
        keys.resize(32 * count);
        for (std::size_t page = 0; page < count; ++page) {
            put(&keys[32 * page], page + 1, 8);
            for (const auto length : run.shape.lengths) {
                buffers.push_back(std::make_unique<std::uint8_t[]>(length));
                run.payload.push_back(buffers.back().get());
            }
        }
        pad.resize(kBlock);
        run.pad = with_pad ? pad.data() : nullptr;
        std::uint8_t* header = headers.data();
        for (std::size_t page = 0; page < count; ++page, header += run.stride) {
            std::memcpy(header, "HICSLOT1", 8);
            put(header + 8, 1, 2);
            put(header + 12, run.shape.header_bytes, 4);
            std::memset(header + 16, 7, 16);
            std::memcpy(header + 32, &keys[32 * page], 32);
            put(header + 112, run.shape.payload_bytes(), 8);
            put(header + 120, run.shape.lengths.size(), 4);
            put(header + 124, chunks, 4);
            put(header + 128, 65536, 4);
            put(header + 132, 1, 2);
            for (std::size_t i = 0; i < run.shape.lengths.size(); ++i) put(header + 192 + 8 * i, run.shape.lengths[i], 8);
        }
    }

    void fill(unsigned seed) {
        std::mt19937_64 random(seed);
        for (std::size_t i = 0; i < buffers.size(); ++i)
            for (std::uint64_t at = 0; at < length_of(i); ++at) buffers[i][at] = static_cast<std::uint8_t>(random());
    }

    bool same(const Pages& other, std::size_t page) const {
        const std::size_t each = run.shape.lengths.size();
        for (std::size_t i = page * each; i < (page + 1) * each; ++i)
            if (std::memcmp(buffers[i].get(), other.buffers[i].get(), length_of(i)) != 0) return false;
        return true;
    }

    std::uint64_t length_of(std::size_t buffer) const { return run.shape.lengths[buffer % run.shape.lengths.size()]; }

    Run run;
    std::vector<std::uint8_t> headers, keys, pad;
    std::vector<std::unique_ptr<std::uint8_t[]>> buffers;
};

struct Read {
    explicit Read(Pages& pages) : verdicts(pages.run.pages(), 99), errors(pages.run.pages(), 99) {
        slots::read(pages.run, pages.keys.data(), verdicts.data(), errors.data());
    }
    std::vector<std::uint8_t> verdicts;
    std::vector<std::int32_t> errors;
};

void comes_back(std::size_t count, const std::vector<std::uint64_t>& lengths) {
    const File file;
    Pages out(count, lengths, true), in(count, lengths, true);
    out.fill(1);
    out.run.fd = in.run.fd = file.fd;
    out.run.offset = in.run.offset = 3 * kBlock;
    const auto written = slots::write(out.run);
    CHECK(written.pages == count && written.error == 0);
    const Read read(in);
    for (std::size_t page = 0; page < count; ++page)
        CHECK(read.verdicts[page] == kValid && read.errors[page] == 0 && in.same(out, page));
}

void what_is_damaged_is_said() {
    const std::vector<std::uint64_t> lengths{70000, 1, 8191};
    const File file;
    Pages out(5, lengths, true), in(5, lengths, true);
    out.fill(2);
    out.run.fd = in.run.fd = file.fd;
    CHECK(slots::write(out.run).pages == 5);
    // A byte of page 1, another key for page 2, a file that ends inside page 4.
    std::uint8_t byte = 0;
    const auto at = static_cast<off_t>(out.run.slot_bytes + out.run.shape.header_bytes + 69999);
    CHECK(pread(file.fd, &byte, 1, at) == 1);
    byte ^= 0x10;
    CHECK(pwrite(file.fd, &byte, 1, at) == 1);
    in.keys[2 * 32 + 31] ^= 1;
    CHECK(ftruncate(file.fd, static_cast<off_t>(4 * out.run.slot_bytes + kBlock + 100)) == 0);
    // Page 4's memory has its bytes from before: what did not arrive now is no page all the same.
    std::memcpy(in.run.header(4), out.run.header(4), out.run.shape.header_bytes);
    for (std::size_t i = 4 * lengths.size(); i < 5 * lengths.size(); ++i)
        std::memcpy(in.buffers[i].get(), out.buffers[i].get(), out.length_of(i));
    const Read read(in);
    const std::vector<std::uint8_t> expected{kValid, kDamaged, kOtherPage, kValid, kDamaged};
    CHECK(read.verdicts == expected);
    for (const auto error : read.errors) CHECK(error == 0);
    CHECK(in.same(out, 0) && in.same(out, 3));
}

void what_cannot_be_moved_has_an_error() {
    Pages pages(3, {5000}, true);
    pages.fill(3);
    pages.run.fd = -1;
    const Read read(pages);
    for (std::size_t page = 0; page < 3; ++page) CHECK(read.errors[page] == EBADF && read.verdicts[page] != kValid);
    const auto written = slots::write(pages.run);
    CHECK(written.pages == 0 && written.error == EBADF);
}

void a_full_disk_keeps_what_is_whole() {
    // More than a call moves at once, and a limit inside one of its later pages.
    const std::vector<std::uint64_t> lengths{300000};
    const File file;
    Pages out(12, lengths, true), in(12, lengths, true);
    out.fill(4);
    out.run.fd = in.run.fd = file.fd;
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    const rlimit small{7 * out.run.slot_bytes + 2 * kBlock, before.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    const auto written = slots::write(out.run);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(written.error != 0 && written.pages <= 7 && written.pages >= 6);
    const Read read(in);
    for (std::size_t page = 0; page < written.pages; ++page) CHECK(read.verdicts[page] == kValid && in.same(out, page));
    for (std::size_t page = 8; page < 12; ++page) CHECK(read.verdicts[page] == kDamaged);
}

void in_memory() {
    Pages pages(4, {65536, 3}, false);
    pages.fill(5);
    slots::seal(pages.run);
    std::vector<std::uint8_t> verdicts(4);
    slots::judge(pages.run, pages.keys.data(), verdicts.data());
    for (const auto verdict : verdicts) CHECK(verdict == kValid);
    pages.buffers[5][2] ^= 1;  // page 2, its second buffer
    slots::judge(pages.run, pages.keys.data(), verdicts.data());
    const std::vector<std::uint8_t> expected{kValid, kValid, kDamaged, kValid};
    CHECK(verdicts == expected);
}

void whole_slots_in_memory() {
    // Header, page and what follows it lie as in the file: one piece, without a pad of its own.
    const File file;
    constexpr std::size_t kPages = 9;
    Pages shape(kPages, {200000}, false);
    std::vector<std::uint8_t> slots_out(kPages * shape.run.slot_bytes), slots_in(slots_out.size());
    Run out = shape.run, in = shape.run;
    for (auto* each : {&out, &in}) {
        auto& memory = each == &out ? slots_out : slots_in;
        each->fd = file.fd;
        each->headers = memory.data();
        each->stride = each->slot_bytes;
        for (std::size_t page = 0; page < kPages; ++page)
            each->payload[page] = memory.data() + page * each->slot_bytes + each->shape.header_bytes;
    }
    std::mt19937_64 random(6);
    for (std::size_t page = 0; page < kPages; ++page) {
        std::memcpy(out.header(page), shape.run.header(page), out.shape.header_bytes);
        for (std::size_t at = 0; at < 200000; ++at) out.payload[page][at] = static_cast<std::uint8_t>(random());
    }
    CHECK(slots::write(out).pages == kPages);
    std::vector<std::uint8_t> verdicts(kPages);
    std::vector<std::int32_t> errors(kPages);
    slots::read(in, shape.keys.data(), verdicts.data(), errors.data());
    for (const auto verdict : verdicts) CHECK(verdict == kValid);
    CHECK(slots_in == slots_out);
}

void threads_side_by_side() {
    const File file;
    const std::vector<std::uint64_t> lengths{30000, 30000};
    std::vector<std::thread> threads;
    for (unsigned number = 0; number < 4; ++number)
        threads.emplace_back([&, number] {
            Pages out(6, lengths, true), in(6, lengths, true);
            out.run.fd = in.run.fd = file.fd;
            out.run.offset = in.run.offset = number * 6 * out.run.slot_bytes;
            for (unsigned round = 0; round < 10; ++round) {
                out.fill(100 * number + round);
                CHECK(slots::write(out.run).pages == 6);
                const Read read(in);
                for (std::size_t page = 0; page < 6; ++page) CHECK(read.verdicts[page] == kValid && in.same(out, page));
            }
        });
    for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
    comes_back(1, {1});
    comes_back(7, {65536});
    comes_back(40, {65537, 4096, 12345});
    comes_back(3, std::vector<std::uint64_t>(1500, 100));  // more buffers than one call takes
    what_is_damaged_is_said();
    what_cannot_be_moved_has_an_error();
    a_full_disk_keeps_what_is_whole();
    in_memory();
    whole_slots_in_memory();
    threads_side_by_side();
}
