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
#include <functional>
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
    void fill(std::uint64_t number) {
        for (std::size_t i = 0; i < memory.size(); ++i)
            for (std::size_t at = 0; at < memory[i].size(); ++at) memory[i][at] = byte(number, i, at);
    }
    void make_header(std::uint64_t number) {
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
    }
    Verdict write(Region& region, std::uint64_t number) {
        fill(number);
        make_header(number);
        std::vector<const std::uint8_t*> from;
        for (const auto& buffer : memory) from.push_back(buffer.data());
        return region.write(shape, identity(number), header.data(), from);
    }
    /// What the region says, and whether a page that it vouches for is the page.
    Verdict read(Region& region, std::uint64_t number) {
        std::vector<std::uint8_t*> to;
        for (auto& buffer : memory) {
            std::fill(buffer.begin(), buffer.end(), std::uint8_t{0xee});
            to.push_back(buffer.data());
        }
        const Verdict verdict = region.read(shape, identity(number), to, true);
        if (verdict == Verdict::kValid) check(number);
        return verdict;
    }
    void check(std::uint64_t number) const {
        for (std::size_t i = 0; i < memory.size(); ++i)
            for (std::size_t at = 0; at < memory[i].size(); ++at) CHECK(memory[i][at] == byte(number, i, at));
    }

    SlotShape shape;
    std::vector<std::vector<std::uint8_t>> memory;
    std::vector<std::uint8_t> header;
};

/// A device as the region sees one, and what happens in the middle of its copies, or after them.
struct Device {
    std::function<void()> in_the_middle, after;
    std::string fails;
    std::uint64_t pieces = 0;
    Mover mover{this, &Device::move};

    static int move(void* self, const Piece* pieces, std::size_t count, const Chunks* chunks, char* why, std::size_t room) {
        auto& device = *static_cast<Device*>(self);
        device.pieces += count;
        const auto check = [&] {
            for (std::size_t i = 0; i < chunks->count; ++i)
                chunks->crcs[i] = hicache::checksum::active().function(
                    reinterpret_cast<const std::uint8_t*>(chunks->addresses[i]), chunks->lengths[i], 0);
        };
        if (chunks->source) check();
        for (std::size_t i = 0; i < count; ++i) {
            read_slot(reinterpret_cast<void*>(pieces[i].to), reinterpret_cast<const std::uint8_t*>(pieces[i].from),
                      pieces[i].bytes / 2);
            if (i == 0 && device.in_the_middle) device.in_the_middle();
            const std::uint64_t half = pieces[i].bytes / 2;
            read_slot(reinterpret_cast<void*>(pieces[i].to + half),
                      reinterpret_cast<const std::uint8_t*>(pieces[i].from + half), pieces[i].bytes - half);
        }
        if (!chunks->source) check();
        if (device.after) device.after();
        std::snprintf(why, room, "%s", device.fails.c_str());
        return device.fails.empty() ? 0 : 1;
    }
};

/// Pages of one namespace in what a device takes for its own.
struct There {
    There(std::vector<std::uint64_t> lengths, std::size_t count) : pages(count, Pages(std::move(lengths))) {}

    std::vector<Identity> identities(const std::vector<std::uint64_t>& numbers) const {
        std::vector<Identity> found;
        for (const auto number : numbers) found.push_back(Pages::identity(number));
        return found;
    }
    std::vector<std::uint64_t> addresses(std::size_t count) const {
        std::vector<std::uint64_t> found;
        for (std::size_t i = 0; i < count; ++i)
            for (const auto& buffer : pages[i].memory) found.push_back(reinterpret_cast<std::uint64_t>(buffer.data()));
        return found;
    }
    std::vector<Verdict> write(Region& region, Device& device, const std::vector<std::uint64_t>& numbers) {
        std::vector<std::uint8_t> headers;
        for (std::size_t i = 0; i < numbers.size(); ++i) {
            pages[i].fill(numbers[i]);
            pages[i].make_header(numbers[i]);
            headers.insert(headers.end(), pages[i].header.begin(), pages[i].header.end());
        }
        std::vector<Verdict> verdicts(numbers.size());
        const auto where = addresses(numbers.size());
        CHECK(region.write_by(device.mover, pages[0].shape, identities(numbers), headers.data(), where.data(), verdicts) ==
              device.fails);
        return verdicts;
    }
    std::vector<Verdict> read(Region& region, Device& device, const std::vector<std::uint64_t>& numbers) {
        for (auto& page : pages)
            for (auto& buffer : page.memory) std::fill(buffer.begin(), buffer.end(), std::uint8_t{0xee});
        std::vector<Verdict> verdicts(numbers.size());
        const auto where = addresses(numbers.size());
        const std::string why =
            region.read_by(device.mover, pages[0].shape, identities(numbers), where.data(), true, verdicts);
        CHECK(why.empty() || why == device.fails);
        for (std::size_t i = 0; i < numbers.size(); ++i)
            if (verdicts[i] == Verdict::kValid) pages[i].check(numbers[i]);
        return verdicts;
    }

    std::vector<Pages> pages;
};

std::vector<Verdict> all(Verdict verdict, std::size_t count) { return std::vector<Verdict>(count, verdict); }

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

void a_device_and_the_cpu_have_the_same_pages() {
    Shared place(16 << 20);
    Process one(place, 1), two(place, 2);
    const std::vector<std::uint64_t> lengths{70000, 300, 4096, 65536};
    There there(lengths, 4);
    Pages here(lengths);
    Device device;
    CHECK(there.read(one.region, device, {1, 2}) == all(Verdict::kAbsent, 2) && device.pieces == 0);
    CHECK(there.write(one.region, device, {1, 2, 3, 4}) == all(Verdict::kStored, 4));
    CHECK(device.pieces == 16);
    CHECK(one.region.counts().pages == 4);
    for (std::uint64_t number = 1; number < 5; ++number) CHECK(here.read(two.region, number) == Verdict::kValid);
    CHECK(here.write(two.region, 5) == Verdict::kStored);
    CHECK((there.write(one.region, device, {5, 6, 1}) ==
           std::vector{Verdict::kPresent, Verdict::kStored, Verdict::kPresent}));
    CHECK(there.read(two.region, device, {5, 6, 1}) == all(Verdict::kValid, 3));
    CHECK(one.region.counts().damaged == 0 && one.region.counts().changed == 0);
    // Buffers that touch on both sides are one copy.
    std::vector<std::uint8_t> block(140000), headers(there.pages[0].header);
    std::uint64_t at[4], sum = 0;
    for (std::size_t i = 0; i < lengths.size(); sum += lengths[i++]) at[i] = reinterpret_cast<std::uint64_t>(&block[sum]);
    std::vector<Verdict> verdict(1);
    device.pieces = 0;
    CHECK(one.region.read_by(device.mover, here.shape, there.identities({5}), at, true, verdict).empty());
    CHECK(verdict[0] == Verdict::kValid && device.pieces == 1);
    sum = 0;
    for (std::size_t i = 0; i < lengths.size(); sum += lengths[i++])
        for (std::size_t k = 0; k < lengths[i]; ++k) CHECK(block[sum + k] == Pages::byte(5, i, k));
}

void what_a_device_read_must_still_be_there() {
    Shared place(2 << 20);
    Process one(place, 1), two(place, 2);
    There there({30000, 30000}, 3);
    Pages here({30000, 30000});
    const std::vector<std::uint64_t> numbers{1, 2, 3};
    for (const bool middle : {true, false}) {
        Device device;
        one.region.clear(here.shape.name_space.data());
        CHECK(there.write(one.region, device, numbers) == all(Verdict::kStored, 3));
        for (const auto more : {4, 5}) CHECK(here.write(one.region, more) == Verdict::kStored);  // the third's extent is sealed
        // Another process writes so many pages that these go, while they are copied, or after that and before they count.
        const auto evict = [&] {
            for (std::uint64_t number = 1000; number < 1200; ++number) here.write(two.region, number);
        };
        (middle ? device.in_the_middle : device.after) = evict;
        CHECK(there.read(one.region, device, numbers) == all(Verdict::kChanged, 3));
        two.region.clear(here.shape.name_space.data());
    }
    CHECK(one.region.counts().damaged == 0 && one.region.counts().changed == 6);
    // Without a change of the slot, other bytes are damage: out of the table, and healed by the next write.
    Device device;
    CHECK(there.write(one.region, device, numbers) == all(Verdict::kStored, 3));
    for (std::uint64_t at = place.geometry.data_at; at + 8 <= place.geometry.file_bytes; at += 8)
        if (std::memcmp(place.base + at, "HICSLOT1", 8) == 0 &&
            std::memcmp(place.base + at + 16, Pages::identity(2).data(), 48) == 0)
            place.base[at + kHeader + 45000] ^= 1;
    const std::vector<Verdict> wanted{Verdict::kValid, Verdict::kDamaged, Verdict::kValid};
    CHECK(there.read(one.region, device, numbers) == wanted);
    CHECK((there.read(two.region, device, numbers) ==
           std::vector{Verdict::kValid, Verdict::kAbsent, Verdict::kValid}));
    CHECK(there.write(two.region, device, numbers)[1] == Verdict::kStored);
    CHECK(there.read(one.region, device, numbers) == all(Verdict::kValid, 3));
}

void a_device_that_fails_leaves_nothing() {
    Shared place(2 << 20);
    Process one(place, 1);
    There there({30000, 30000}, 40);
    Pages here({30000, 30000});
    Device device;
    const std::vector<std::uint64_t> numbers{1, 2, 3};
    CHECK(here.write(one.region, 2) == Verdict::kStored);
    device.fails = "a launch failed";
    std::vector<Verdict> wanted{Verdict::kUnknown, Verdict::kPresent, Verdict::kUnknown};
    for (int again = 0; again < 200; ++again) CHECK(there.write(one.region, device, numbers) == wanted);
    CHECK(one.region.counts().pages <= 1);
    for (const auto number : {1, 3}) CHECK(here.read(one.region, number) == Verdict::kAbsent);
    CHECK((there.read(one.region, device, {1}) == all(Verdict::kAbsent, 1)));
    CHECK(here.write(one.region, 2) != Verdict::kNoRoom);
    CHECK((there.read(one.region, device, {2, 1}) == std::vector{Verdict::kUnknown, Verdict::kAbsent}));
    device.fails.clear();
    CHECK((there.read(one.region, device, {2}) == all(Verdict::kValid, 1)));
    CHECK(one.region.counts().damaged == 0);
    // A page that somebody else stores while it is on its way is there once.
    device.after = [&] { CHECK(here.write(one.region, 50) == Verdict::kStored); };
    CHECK((there.write(one.region, device, {50}) == all(Verdict::kPresent, 1)));
    device.after = nullptr;
    CHECK(one.region.remove(Pages::identity(50)) && !one.region.has(Pages::identity(50), false));
    // More at once than the region holds: what has arrived makes room for the rest.
    std::vector<std::uint64_t> many;
    for (std::uint64_t number = 100; number < 140; ++number) many.push_back(number);
    for (int again = 0; again < 5; ++again, one.region.clear(here.shape.name_space.data()))
        CHECK(there.write(one.region, device, many) == all(Verdict::kStored, 40));
    CHECK(here.write(one.region, 1) == Verdict::kStored);
}

/// Threads of two processes' ends: writers that evict all the time, readers of what may go at any moment.
void many_at_once(double seconds) {
    Shared place(1 << 20);
    Process one(place, 1), two(place, 2);
    std::atomic<bool> over = false;
    std::atomic<std::uint64_t> newest = 0, valid = 0, by_device = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i)
        threads.emplace_back([&, i] {
            Region& region = i == 0 ? one.region : two.region;
            There there({20000, 300}, 3);
            Device device;
            std::mt19937_64 random(static_cast<unsigned>(i));
            while (!over) {
                if (random() % 3 == 0) {
                    const std::uint64_t first = newest.fetch_add(3) + 1;
                    device.fails = random() % 8 == 0 ? "on purpose" : "";
                    there.write(region, device, {first, first + 1, first + 2});
                }
                const std::uint64_t last = newest, number = last - std::min<std::uint64_t>(last, random() % 40);
                device.fails.clear();
                for (const auto verdict : there.read(region, device, {number, number + 1, number + 2})) {
                    CHECK(verdict != Verdict::kDamaged && verdict != Verdict::kUnknown);
                    by_device += verdict == Verdict::kValid;
                }
            }
        });
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
    while (std::chrono::steady_clock::now() < until || valid < 50 || by_device < 50 || newest < 200)
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
    a_device_and_the_cpu_have_the_same_pages();
    what_a_device_read_must_still_be_there();
    a_device_that_fails_leaves_nothing();
    many_at_once(2);
    std::puts("ok");
}
