// The region without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: what threads, processes that stop or die anywhere, and damage can do to a region, and the copy that
// computes checksums. What callers see is tested from Python, against a model.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "checksum/copy.hpp"
#include "checksum/crc32c.hpp"
#include "memory/region.hpp"
#include "test/check.hpp"

using namespace hicache::memory;
using hicache::io::SlotShape;

namespace {

constexpr std::uint64_t kHeader = 4096;

void put(std::uint8_t* at, std::uint64_t value, std::size_t bytes) { std::memcpy(at, &value, bytes); }

/// Pages of one namespace, whose bytes follow from their number.
struct Pages {
    explicit Pages(std::vector<std::uint64_t> lengths) {
        shape.header_bytes = kHeader;
        shape.lengths = std::move(lengths);
        shape.name_space.fill(7);
        CHECK(shape.fits());
        for (const auto length : shape.lengths) {
            memory.emplace_back(length + 64);
            memory.back().resize(length);
        }
        header.resize(kHeader);
    }

    static Identity identity(std::uint64_t number) {
        Identity page{};
        page.fill(7);
        std::mt19937_64 random(number);
        for (std::size_t at = 16; at < page.size(); at += 8) put(page.data() + at, random(), 8);
        return page;
    }
    static std::uint8_t byte(std::uint64_t number, std::size_t buffer, std::size_t at) {
        return static_cast<std::uint8_t>((number + 1) * 0x9e3779b97f4a7c15u >> (at % 8 * 7 + buffer));
    }
    Verdict write(Region& region, std::uint64_t number) {
        std::vector<const std::uint8_t*> from;
        for (std::size_t i = 0; i < memory.size(); ++i) {
            for (std::size_t at = 0; at < memory[i].size(); ++at) memory[i][at] = byte(number, i, at);
            from.push_back(memory[i].data());
        }
        const Identity page = identity(number);
        std::fill(header.begin(), header.end(), std::uint8_t{0});
        std::memcpy(header.data(), "HICSLOT1", 8);
        put(&header[8], 1, 2);
        put(&header[12], kHeader, 4);
        std::memcpy(&header[16], page.data(), 48);
        put(&header[112], shape.payload_bytes(), 8);
        put(&header[120], shape.lengths.size(), 4);
        std::uint64_t chunks = 0;
        for (const auto length : shape.lengths) chunks += (length + 65535) / 65536;
        put(&header[124], chunks, 4);
        put(&header[128], 65536, 4);
        put(&header[132], 1, 2);
        std::memcpy(&header[192], shape.lengths.data(), 8 * shape.lengths.size());
        return region.write(shape, page, header.data(), from);
    }
    /// What the region says, and whether a page that it vouches for is the page.
    Verdict read(Region& region, std::uint64_t number) {
        std::vector<std::uint8_t*> to;
        for (auto& buffer : memory) {
            std::fill(buffer.begin(), buffer.end(), std::uint8_t{0xee});
            to.push_back(buffer.data());
        }
        const Verdict verdict = region.read(shape, identity(number), to, true);
        if (verdict == Verdict::kValid)
            for (std::size_t i = 0; i < memory.size(); ++i)
                for (std::size_t at = 0; at < memory[i].size(); ++at) CHECK(memory[i][at] == byte(number, i, at));
        return verdict;
    }

    SlotShape shape;
    std::vector<std::vector<std::uint8_t>> memory;
    std::vector<std::uint8_t> header;
};

/// Memory that children share, and the file of the locks by which processes tell who lives.
struct Shared {
    explicit Shared(std::uint64_t capacity) : geometry(Geometry::of(capacity)) {
        fd = memfd_create("region-test", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(geometry.file_bytes)) == 0);
        base = static_cast<std::uint8_t*>(
            mmap(nullptr, geometry.file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
        CHECK(base != MAP_FAILED);
        std::snprintf(locks, sizeof locks, "region-test-XXXXXX");
        const int made = mkstemp(locks);
        CHECK(made >= 0);
        close(made);
        Region::format(base, geometry);
        CHECK(Region::problem(base, geometry.file_bytes).empty());
    }
    ~Shared() {
        unlink(locks);
        munmap(base, geometry.file_bytes);
        close(fd);
    }
    /// A file description of its own that holds the owner's byte, as each process has.
    int lock(unsigned owner) const {
        const int own = open(locks, O_RDWR | O_CLOEXEC);
        CHECK(own >= 0);
        struct flock lock {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = owner;
        lock.l_len = 1;
        CHECK(fcntl(own, F_OFD_SETLK, &lock) == 0);
        return own;
    }

    Geometry geometry;
    int fd = -1;
    std::uint8_t* base = nullptr;
    char locks[32];
};

struct Process {
    Process(Shared& place, unsigned owner) : locked(place.lock(owner)), region(place.base, place.fd, locked, owner) {}
    ~Process() { close(locked); }
    int locked;
    Region region;
};

void copies_are_whole_and_their_checksums_right() {
    std::mt19937_64 random(1);
    std::vector<std::uint8_t> from(200000), to(200000);
    for (auto& byte : from) byte = static_cast<std::uint8_t>(random());
    const auto portable = hicache::checksum::implementations().back().function;
    for (int i = 0; i < 600; ++i) {
        const std::size_t length = random() % (i % 2 ? 70000 : 1500), at = random() % 200;
        std::size_t start = random() % 200;
        if (i % 3 == 0) start += 64 - reinterpret_cast<std::uintptr_t>(to.data() + start) % 64;
        std::fill(to.begin(), to.end(), std::uint8_t{0x5a});
        const auto sum = hicache::checksum::copy(to.data() + start, from.data() + at, length, i % 4 < 2);
        CHECK(sum == portable(from.data() + at, length, 0));
        CHECK(std::memcmp(to.data() + start, from.data() + at, length) == 0);
        CHECK(start == 0 || to[start - 1] == 0x5a);
        CHECK(to[start + length] == 0x5a);
    }
}

void one_process_and_what_it_stored() {
    Shared place(2 << 20);
    Process one(place, 1);
    Pages pages({70000, 300, 4096});
    CHECK(pages.read(one.region, 0) == Verdict::kAbsent);
    CHECK(pages.write(one.region, 0) == Verdict::kStored);
    CHECK(pages.write(one.region, 0) == Verdict::kPresent);
    CHECK(pages.read(one.region, 0) == Verdict::kValid);
    CHECK(one.region.counts().pages == 1);
    CHECK(one.region.remove(Pages::identity(0)) && !one.region.remove(Pages::identity(0)));
    CHECK(pages.read(one.region, 0) == Verdict::kAbsent);
    for (std::uint64_t number = 1; number < 200; ++number) CHECK(pages.write(one.region, number) == Verdict::kStored);
    CHECK(pages.read(one.region, 199) == Verdict::kValid);
    CHECK(pages.read(one.region, 1) == Verdict::kAbsent);
    CHECK(one.region.counts().evicted > 100);
    CHECK(!one.region.going(1000).empty());
    Pages large({one.region.extent_bytes()});
    CHECK(large.write(one.region, 1000) == Verdict::kNoRoom);
    // Every byte of the extents damaged: nothing of it is a page, and none of it breaks anything.
    std::mt19937_64 random(2);
    for (std::uint64_t at = place.geometry.data_at; at + 8 <= place.geometry.file_bytes; at += 512)
        put(place.base + at, random(), 8);
    for (std::uint64_t number = 1; number < 200; ++number) CHECK(pages.read(one.region, number) != Verdict::kValid);
    one.region.clear(pages.shape.name_space.data());
    for (std::uint64_t number = 300; number < 500; ++number) pages.write(one.region, number);
    CHECK(pages.read(one.region, 499) == Verdict::kValid);
}

void memory_is_there_before_it_is_written() {
    Shared place(16 << 20);
    Process one(place, 1);
    Pages pages({60000});
    CHECK(one.region.opened() == 0);
    std::uint64_t steps = 0;
    while (one.region.prepare(4 << 20, 64 << 10)) ++steps;
    CHECK(steps >= 64 && steps < 100);
    CHECK(!one.region.prepare(4 << 20, 64 << 10));
    CHECK(pages.write(one.region, 1) == Verdict::kStored);
    CHECK(one.region.opened() == 1);
    CHECK(one.region.prepare(4 << 20, 64 << 10));
    std::atomic<bool> over = false;
    std::thread ahead([&] {
        while (!over)
            if (!one.region.prepare(4 << 20, 64 << 10)) std::this_thread::yield();
    });
    for (std::uint64_t number = 2; number < 400; ++number) CHECK(pages.write(one.region, number) == Verdict::kStored);
    over = true;
    ahead.join();
    CHECK(pages.read(one.region, 399) == Verdict::kValid);
}

/// Threads of two processes' ends: writers that evict all the time, readers of what may go at any moment.
void many_at_once(double seconds) {
    Shared place(1 << 20);
    Process one(place, 1), two(place, 2);
    std::atomic<bool> over = false;
    std::atomic<std::uint64_t> newest = 0, valid = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            Region& region = i == 0 ? one.region : two.region;
            Pages pages({20000, 300});
            while (!over) {
                const std::uint64_t number = ++newest;
                pages.write(region, number);
                if (number % 5 == 0) region.remove(Pages::identity(number - 2));
                if (number % 500 == 0) region.clear(pages.shape.name_space.data());
                if (number % 50 == 0) region.going(8);
            }
        });
    for (int i = 0; i < 2; ++i)
        threads.emplace_back([&, i] {
            Region& region = i == 0 ? one.region : two.region;
            Pages pages({20000, 300});
            std::mt19937_64 random(static_cast<unsigned>(i));
            while (!over) {
                const std::uint64_t last = newest, number = last - std::min<std::uint64_t>(last, random() % 40);
                const Verdict verdict = pages.read(region, number);
                CHECK(verdict != Verdict::kDamaged);
                valid += verdict == Verdict::kValid;
                region.has(Pages::identity(number), true);
            }
        });
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (std::chrono::steady_clock::now() < until || valid < 50 || newest < 200)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    over = true;
    for (auto& thread : threads) thread.join();
    CHECK(one.region.counts().evicted + two.region.counts().evicted > 50);
    Pages pages({20000, 300});
    CHECK(pages.write(one.region, 1 << 30) == Verdict::kStored);
    CHECK(pages.read(two.region, 1 << 30) == Verdict::kValid);
}

/// A writer that is stopped, goes on, and is killed, each time between any two instructions.
void a_process_dies_in_the_middle(unsigned turn, Shared& place, Process& mine) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        Process its(place, 2);
        Pages pages({30000, 30000});
        for (std::uint64_t number = 1'000'000 * (turn + 1);; ++number) pages.write(its.region, number);
    }
    Pages pages({30000, 30000});
    std::mt19937_64 random(turn);
    const auto pause = [&] { usleep(static_cast<useconds_t>(2000 + random() % 20000)); };
    pause();
    kill(child, SIGSTOP);
    const std::uint64_t first = 1000 * (turn + 1);
    for (std::uint64_t i = 0; i < 60; ++i) {  // nobody waits for who stands still
        CHECK(pages.write(mine.region, first + i) != Verdict::kPresent);
        CHECK(pages.read(mine.region, first + i) != Verdict::kDamaged);
    }
    kill(child, SIGCONT);
    pause();
    kill(child, SIGKILL);
    CHECK(waitpid(child, nullptr, 0) == child);
    for (std::uint64_t i = 0; i < 2000; ++i) CHECK(pages.read(mine.region, 1'000'000 * (turn + 1) + i) != Verdict::kDamaged);
    // Its extents are used again: more fits than there would be room for beside them.
    for (std::uint64_t i = 100; i < 200; ++i) CHECK(pages.write(mine.region, first + i) == Verdict::kStored);
    CHECK(pages.read(mine.region, first + 199) == Verdict::kValid);
    CHECK(mine.region.counts().bytes <= 1 << 20);
}

}  // namespace

int main() {
    // Children first: a process that has had threads may not fork under TSan.
    {
        Shared place(1 << 20);
        Process mine(place, 1);
        for (unsigned turn = 0; turn < 12; ++turn) a_process_dies_in_the_middle(turn, place, mine);
        CHECK(mine.region.counts().takeovers > 0);
    }
    copies_are_whole_and_their_checksums_right();
    one_process_and_what_it_stored();
    memory_is_there_before_it_is_written();
    many_at_once(2);
    std::puts("ok");
}
