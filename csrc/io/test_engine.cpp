// The engine without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: what threads and memory can get wrong (hand-over, close under load, registration beside I/O, short
// transfers). What bytes mean is tested from Python, against a second implementation.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "checksum/crc32c.hpp"
#include "io/engine.hpp"
#include "test/check.hpp"

using namespace hicache::io;

namespace {

constexpr std::uint64_t kHeader = 4096;

struct Memory {
    explicit Memory(std::size_t size) : size(size) {
        at = static_cast<std::uint8_t*>(
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        CHECK(at != MAP_FAILED);
    }
    ~Memory() { munmap(at, size); }
    std::size_t size;
    std::uint8_t* at;
};

struct File {
    explicit File(std::size_t size) {
        char path[] = "engine-test-XXXXXX";
        fd = mkstemp(path);
        CHECK(fd >= 0);
        std::string name = path;
        const int direct = open(path, O_RDWR | O_DIRECT);
        if (direct >= 0) {
            close(fd);
            fd = direct;
        }
        unlink(name.c_str());
        CHECK(ftruncate(fd, static_cast<off_t>(size)) == 0);
    }
    ~File() { close(fd); }
    int fd;
};

/// The one reader of an engine: counts ends by token, keeps the last verdict and result of each page.
struct Reader {
    explicit Reader(Engine& engine) : thread([this, &engine] {
        for (auto ended = engine.reap(); !ended.empty(); ended = engine.reap()) {
            const std::scoped_lock lock(mutex);
            for (const Ended& end : ended) {
                auto& of = pages[end.token];
                CHECK(of.emplace(end.page, end).second);  // once each
            }
            changed.notify_all();
        }
    }) {}
    std::map<std::uint32_t, Ended> wait(std::uint64_t token, std::size_t count) {
        std::unique_lock lock(mutex);
        CHECK(changed.wait_for(lock, std::chrono::seconds(60), [&] { return pages[token].size() == count; }));
        return pages[token];
    }
    std::mutex mutex;
    std::condition_variable changed;
    std::map<std::uint64_t, std::map<std::uint32_t, Ended>> pages;
    std::thread thread;
};

void put(std::uint8_t* at, std::uint64_t value, std::size_t bytes) { std::memcpy(at, &value, bytes); }

/// A header as Python prepares it, checksums 0.
void prepare_header(std::uint8_t* header, const SlotShape& shape, const std::uint8_t* key) {
    std::memset(header, 0, shape.header_bytes);
    std::memcpy(header, "HICSLOT1", 8);
    put(header + 8, 1, 2);
    put(header + 12, shape.header_bytes, 4);
    std::memcpy(header + 16, shape.name_space.data(), 16);
    std::memcpy(header + 32, key, 32);
    put(header + 112, shape.payload_bytes(), 8);
    put(header + 120, shape.lengths.size(), 4);
    std::uint64_t chunks = 0;
    for (const auto length : shape.lengths) chunks += (length + 65535) / 65536;
    put(header + 124, chunks, 4);
    put(header + 128, 65536, 4);
    put(header + 132, 1, 2);
    std::memcpy(header + 192, shape.lengths.data(), 8 * shape.lengths.size());
}

struct Tier {
    Tier(std::uint32_t pages, std::uint64_t buffer, bool bounced)
        : pages(pages), bounced(bounced), slot(kHeader + (2 * buffer + 4095) / 4096 * 4096), file(pages * slot),
          memory(pages * 2 * (buffer + 4096)), travel(pages * slot) {
        shape.header_bytes = kHeader;
        shape.lengths = {buffer, buffer};
        shape.name_space.fill(7);
        CHECK(shape.fits());
    }
    std::uint8_t* payload(std::uint32_t page, int buffer) const {
        return memory.at + (2 * page + static_cast<std::uint32_t>(buffer)) * (shape.lengths[0] + 4095) / 4096 * 4096;
    }
    void fill(std::uint8_t seed) const {
        std::mt19937_64 random(seed);
        for (std::size_t i = 0; i + 8 <= memory.size; i += 8) put(memory.at + i, random(), 8);
    }
    std::shared_ptr<Batch> batch(std::uint64_t token, bool write, const std::uint8_t* cancelled = nullptr) const {
        auto made = std::make_shared<Batch>();
        made->token = token;
        Slots& slots = made->slots.emplace();
        slots.shape = shape;
        for (std::uint32_t page = 0; page < pages; ++page) {
            std::uint8_t key[32] = {};
            put(key, page, 4);
            slots.keys.insert(slots.keys.end(), key, key + 32);
            std::uint8_t* header = travel.at + page * slot;
            if (write) prepare_header(header, shape, key);
            const auto first = static_cast<std::uint32_t>(made->buffers.size());
            if (bounced) {
                made->buffers.push_back({header, slot});
                for (int j = 0; j < 2; ++j) slots.copies.push_back(payload(page, j));
            } else {
                made->buffers.push_back({header, kHeader});
                for (int j = 0; j < 2; ++j) made->buffers.push_back({payload(page, j), shape.lengths[0]});
            }
            made->pages.push_back({file.fd, write, first, static_cast<std::uint32_t>(made->buffers.size()) - first,
                                   page * slot, 1 + token % 3, cancelled});
        }
        return made;
    }
    std::uint32_t pages;
    bool bounced;
    std::uint64_t slot;
    SlotShape shape;
    File file;
    Memory memory, travel;
};

void round_trips(const Options& options, std::uint64_t buffer, bool bounced) {
    Engine engine(options);
    Reader reader(engine);
    const Tier tier(24, buffer, bounced);
    engine.register_memory(reinterpret_cast<std::uint64_t>(tier.memory.at), tier.memory.size);
    tier.fill(1);
    std::vector<std::uint8_t> before(tier.memory.at, tier.memory.at + tier.memory.size);
    CHECK(engine.submit(tier.batch(1, true)));
    for (const auto& [page, end] : reader.wait(1, tier.pages)) CHECK(end.moved > 0);
    tier.fill(2);
    CHECK(engine.submit(tier.batch(2, false)));
    for (const auto& [page, end] : reader.wait(2, tier.pages)) CHECK(end.verdict == Verdict::kValid);
    for (std::uint32_t page = 0; page < tier.pages; ++page)
        for (int j = 0; j < 2; ++j) {
            const std::uint8_t* at = tier.payload(page, j);
            CHECK(std::memcmp(at, before.data() + (at - tier.memory.at), buffer) == 0);
        }
    // Damage in one page, the file cut within another, and one that is not there at all.
    std::uint8_t* scratch = tier.travel.at;
    CHECK(pread(tier.file.fd, scratch, 4096, static_cast<off_t>(3 * tier.slot + kHeader)) == 4096);
    scratch[77] ^= 4;
    CHECK(pwrite(tier.file.fd, scratch, 4096, static_cast<off_t>(3 * tier.slot + kHeader)) == 4096);
    CHECK(ftruncate(tier.file.fd, static_cast<off_t>(22 * tier.slot + kHeader)) == 0);
    CHECK(engine.submit(tier.batch(3, false)));
    for (const auto& [page, end] : reader.wait(3, tier.pages)) {
        const bool whole = page != 3 && page < 22;
        CHECK(end.verdict == (whole ? Verdict::kValid : Verdict::kDamaged));
        CHECK(page != 22 || end.moved == static_cast<std::int64_t>(kHeader));
        CHECK(page != 23 || end.moved == 0);
    }
    engine.retain({});
    CHECK(engine.close(60));
    CHECK(!engine.submit(tier.batch(4, false)));
    engine.stop_reaping();
    reader.thread.join();
}

void many_callers_under_close(const Options& options) {
    for (int turn = 0; turn < 3; ++turn) {
        Engine engine(options);
        Reader reader(engine);
        const Tier tier(16, 65536, false);
        tier.fill(3);
        CHECK(engine.submit(tier.batch(1, true)));
        reader.wait(1, tier.pages);
        std::atomic<std::uint64_t> token{100};
        std::atomic<int> refused{0};
        std::uint8_t cancelled = 0;
        std::vector<std::thread> callers;
        std::vector<std::unique_ptr<Tier>> tiers;
        for (int i = 0; i < 4; ++i) tiers.push_back(std::make_unique<Tier>(16, 65536, i % 2 == 0));
        for (int i = 0; i < 4; ++i)
            callers.emplace_back([&, i] {
                for (int k = 0; k < 30; ++k) {
                    const std::uint64_t mine = token++;
                    const bool write = k % 3 == 0;
                    if (!engine.submit(tiers[static_cast<std::size_t>(i)]->batch(mine, write, &cancelled))) {
                        ++refused;
                        return;
                    }
                    for (const auto& [page, end] : reader.wait(mine, 16))
                        CHECK(end.moved > 0 || end.moved == -ECANCELED);
                    if (k % 5 == 0)
                        engine.register_memory(reinterpret_cast<std::uint64_t>(tier.memory.at), tier.memory.size);
                    if (k % 7 == 0) engine.retain({2});
                }
            });
        usleep(20000);
        if (turn == 2) __atomic_store_n(&cancelled, 1, __ATOMIC_RELEASE);
        CHECK(engine.close(60));
        for (auto& caller : callers) caller.join();
        engine.stop_reaping();
        reader.thread.join();
    }
}

void a_device_that_does_not_answer(const Options& options) {
    // A pipe that nobody writes to; the engine asks the kernel to give the read up.
    int ends[2];
    CHECK(pipe(ends) == 0);
    Memory memory(4096);
    Engine engine(options);
    Reader reader(engine);
    auto batch = std::make_shared<Batch>();
    batch->token = 9;
    batch->buffers.push_back({memory.at, 16});
    batch->pages.push_back({ends[0], false, 0, 1, 0, 0, nullptr});
    CHECK(engine.submit(batch));
    usleep(10000);
    CHECK(engine.close(60));
    CHECK(reader.wait(9, 1).at(0).moved == -ECANCELED);
    engine.stop_reaping();
    reader.thread.join();
    close(ends[0]);
    close(ends[1]);
}

void headers_of_any_bytes() {
    std::mt19937_64 random(5);
    SlotShape shape;
    shape.header_bytes = 8192;
    shape.lengths = {4096, 70000};
    std::vector<std::uint8_t> header(8192), payload(4096 + 70000), key(32, 1);
    const std::uint8_t* buffers[] = {payload.data(), payload.data() + 4096};
    for (int i = 0; i < 20000; ++i) {
        prepare_header(header.data(), shape, key.data());
        seal(shape, header.data(), buffers);
        CHECK(i % 1000 != 0 || verify(shape, key.data(), header.data(), buffers, 1 << 20) == Verdict::kValid);
        for (int k = 0; k < 3; ++k) {
            const std::size_t at = random() % 224;
            header[at] = static_cast<std::uint8_t>(random() % 3 == 0 ? 0xFF : random());
        }
        // Resealed, so that the checks behind the checksum are reached.
        std::uint64_t size = 0;
        std::memcpy(&size, header.data() + 12, 4);
        if (size >= 4096 && size <= header.size()) {
            put(header.data() + 140, 0, 4);
            put(header.data() + 140, hicache::checksum::active().function(header.data(), size, 0), 4);
        }
        verify(shape, key.data(), header.data(), buffers, random() % 100000);
    }
}

}  // namespace

int main() {
    headers_of_any_bytes();
    for (const unsigned rings : {1u, 3u}) {
        const Options options{rings, 8, false, false};
        round_trips(options, 8192, false);
        round_trips(options, 512 << 10, false);
        round_trips(options, 70272, true);
        many_callers_under_close(options);
        a_device_that_does_not_answer(options);
    }
    std::puts("engine: ok");
}
