// The index without Python, for the sanitizers: `make sanitize` builds it with ASan and UBSan, and with TSan.
//
// Belongs here: what memory can get wrong (nodes given back and taken again, places, pins that outlive pages, records of
// any content), against a model of plain maps; and the sorting of a snapshot beside calls under the lock, for TSan. Which
// page goes first is tested from Python, against the Python index.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <tuple>

#include "index/index.hpp"
#include "test/check.hpp"

using namespace hicache::index;

namespace {

constexpr std::uint64_t SECOND = 1'000'000'000;

using Random = std::mt19937;
std::uint32_t below(Random& random, std::uint32_t end) { return static_cast<std::uint32_t>(random() % end); }

Digest space_of(std::uint32_t number) {
    Digest space{};
    space[0] = static_cast<std::uint8_t>('a' + number);
    return space;
}

/// Pages form a tree: page n's parent is n / 2. Some keys differ in their last word only.
Key key_of(std::uint32_t name) { return Key{{name % 7 == 0 ? 1u : name, 2, 3, name}}; }
Key parent_of(std::uint32_t name) { return name < 2 ? Key{} : key_of(name / 2); }

struct Known {
    std::uint32_t folder, extent, slot;
    std::uint64_t generation, seconds;
    bool own;
};

/// The index and what it should hold.
class Pair {
public:
    Pair(Policy policy, std::uint32_t seed) : index_(policy), random_(seed) {}

    void step() {
        switch (below(random_, 16)) {
            case 0: case 1: case 2: case 3: insert(); break;
            case 4: remove(); break;
            case 5: case 6: lookup(); break;
            case 7: pin(); break;
            case 8: unpin(); break;
            case 9: foresee(); evict(); break;
            case 10: expire(); break;
            case 11: forget_orphans(); break;
            case 12: log(); break;
            case 13: if (below(random_, 8) == 0) adopt(); break;
            case 14: snapshot(); break;
            default: if (below(random_, 16) == 0) take_extent();
        }
    }

    void check() {
        CHECK(index_.size() == pages_.size());
        std::size_t orphans = 0;
        for (const auto& [name, known] : pages_) {
            const std::uint32_t n = index_.find(space_of(name.first), key_of(name.second));
            CHECK(n != NONE);
            const Page page = index_.page(n);
            CHECK(page.key == key_of(name.second) && page.space == space_of(name.first));
            CHECK(page.folder == known.folder && page.extent == known.extent && page.slot == known.slot);
            CHECK(page.generation == known.generation && page.own == known.own);
            CHECK(page.time_ns == known.seconds * SECOND);
            CHECK(page.parent.unknown() || page.parent == parent_of(name.second));
            CHECK(index_.at(known.folder, known.extent, known.slot) == n);
            if (known.own && !page.parent.unknown() && index_.find(page.space, page.parent) == NONE) ++orphans;
        }
        CHECK(index_.orphans() <= orphans);
        for (std::uint32_t folder = 0; folder < 3; ++folder) {
            std::size_t held = 0;
            for (const std::uint32_t extent : index_.extents(folder)) {
                const Numbers there = index_.in_extent(folder, extent);
                CHECK(!there.empty());
                held += there.size();
            }
            CHECK(held == index_.in_folder(folder).size());
            held_[folder] = held;
        }
        CHECK(held_[0] + held_[1] + held_[2] == pages_.size());
    }

    /// Everything goes, and nothing is left behind.
    void finish() {
        while (!readers_.empty()) unpin();
        adopt_all({0, 1, 2});
        for (auto& [name, known] : pages_) known.own = true;
        for (std::uint32_t space = 0; space < 3; ++space) gone(index_.evict(space_of(space), 1u << 20, {}));
        CHECK(pages_.empty() && index_.size() == 0 && index_.orphans() == 0);
    }

private:
    using Name = std::pair<std::uint32_t, std::uint32_t>;

    Name name() { return {below(random_, 3), 1 + below(random_, 300)}; }

    void insert() {
        const Name name = this->name();
        const std::uint32_t folder = below(random_, 3), place = below(random_, 600);
        Known known{folder, place / 40, place % 40, ++generation_, ++now_, folder == 0};
        const Page page{space_of(name.first), key_of(name.second), below(random_, 4) ? parent_of(name.second) : Key{},
                        known.folder, known.extent, known.slot, known.generation, known.seconds * SECOND + 7, known.own, 0};
        Page old;
        bool replaced;
        const std::uint32_t n = index_.insert(page, folder == 0 && below(random_, 9) == 0, &old, &replaced);
        CHECK(replaced == pages_.contains(name));
        if (replaced) CHECK(old.generation == pages_[name].generation);
        took(name, known);
        if (below(random_, 2)) index_.touch(page.space, std::span(&n, 1), below(random_, 2) != 0);
    }

    /// The model of an insertion: whatever had this key, or lay in this slot, is gone.
    void took(const Name& name, const Known& known) {
        std::erase_if(pages_, [&](const auto& other) {
            return std::tuple(other.second.folder, other.second.extent, other.second.slot) ==
                   std::tuple(known.folder, known.extent, known.slot);
        });
        pages_[name] = known;
    }

    void gone(const std::vector<Page>& pages) {
        for (const Page& page : pages) {
            CHECK(page.pins == 0 && page.own);
            const auto found = std::find_if(pages_.begin(), pages_.end(), [&](const auto& other) {
                return other.second.generation == page.generation;
            });
            CHECK(found != pages_.end() && key_of(found->first.second) == page.key);
            pages_.erase(found);
        }
    }

    void remove() {
        if (pages_.empty()) return;
        auto at = pages_.begin();
        std::advance(at, below(random_, static_cast<std::uint32_t>(pages_.size())));
        index_.remove(index_.find(space_of(at->first.first), key_of(at->first.second)), below(random_, 2) != 0);
        pages_.erase(at);
    }

    bool usable(const Name& name) {
        const auto found = pages_.find(name);
        return found != pages_.end() && found->second.seconds >= oldest_[name.first];
    }

    void lookup() {
        const std::uint32_t space = below(random_, 3);
        std::vector<std::uint8_t> keys, parents;
        std::vector<Name> names;
        for (std::uint32_t i = below(random_, 140); i != 0; --i) {
            names.emplace_back(space, 1 + below(random_, 300));
            const Key key = key_of(names.back().second), parent = parent_of(names.back().second);
            keys.insert(keys.end(), reinterpret_cast<const std::uint8_t*>(&key), reinterpret_cast<const std::uint8_t*>(&key + 1));
            parents.insert(parents.end(), reinterpret_cast<const std::uint8_t*>(&parent),
                           reinterpret_cast<const std::uint8_t*>(&parent + 1));
        }
        Numbers found;
        index_.lookup(space_of(space), keys, below(random_, 2) ? parents.data() : nullptr, found);
        for (std::size_t i = 0; i < names.size(); ++i) CHECK((found[i] != NONE) == usable(names[i]));
        index_.touch(space_of(space), found, true);
        if (!names.empty()) index_.ancestors(space_of(space), key_of(names[0].second));
    }

    void pin() {
        const Name name = this->name();
        const std::uint32_t n = index_.find(space_of(name.first), key_of(name.second));
        if (n == NONE) return;
        readers_.emplace_back(index_.pins().take(n), pages_[name].generation);
        index_.pins().fail(readers_.back().first);
    }

    void unpin() {
        if (readers_.empty()) return;
        std::swap(readers_[below(random_, static_cast<std::uint32_t>(readers_.size()))], readers_.back());
        const auto [handle, generation] = readers_.back();
        readers_.pop_back();
        CHECK(index_.pinned(handle).generation == generation);
        const auto same = [g = generation](const auto& other) { return other.second.generation == g; };
        const auto reads = [g = generation](const auto& other) { return other.second == g; };
        const bool there = std::any_of(pages_.begin(), pages_.end(), same);
        const bool last = std::none_of(readers_.begin(), readers_.end(), reads);
        CHECK(index_.pins().give(handle) == (last && !there));
    }

    /// Asking what goes next changes nothing; `check` and the evictions that follow would show it.
    void foresee() {
        const Digest space = space_of(below(random_, 3));
        const std::size_t count = below(random_, 40);
        const Numbers next = index_.going(space, count, below(random_, 200));
        CHECK(next.size() <= count && next.size() == std::set<std::uint32_t>(next.begin(), next.end()).size());
        for (const std::uint32_t n : next) CHECK(index_.page(n).own && index_.page(n).space == space);
    }

    void evict() {
        const Name kept = name();
        const Key key = key_of(kept.second);
        const auto before = pages_.contains(kept);
        const std::uint32_t space = below(random_, 3);
        index_.set_capacity(space_of(space), 1 + below(random_, 400));
        gone(index_.evict(space_of(kept.first), below(random_, 6), {reinterpret_cast<const std::uint8_t*>(&key), KEY_BYTES}));
        CHECK(pages_.contains(kept) == before);
    }

    void expire() {
        const std::uint32_t space = below(random_, 3);
        oldest_[space] = now_ > 200 ? now_ - below(random_, 400) % now_ : 0;
        index_.set_oldest(space_of(space), oldest_[space] * SECOND);
        std::set<std::uint64_t> due;
        for (const auto& [name, known] : pages_)
            if (known.own && name.first == space && !usable(name)) due.insert(known.generation);
        const std::size_t limit = 1 + below(random_, 9), examine = 20 + below(random_, 90);
        for (std::size_t calls = 0; calls < pages_.size() / limit + 50; ++calls)
            for (const std::uint32_t n : index_.expired(space_of(space), limit, examine)) {
                const Page page = index_.page(n);
                CHECK(due.erase(page.generation) == 1);
                index_.remove(n, false);
                std::erase_if(pages_, [&](const auto& other) { return other.second.generation == page.generation; });
            }
        CHECK(due.empty());
    }

    void forget_orphans() {
        for (int calls = 0; calls < 5; ++calls) {
            std::vector<Page> found;
            const Numbers nodes = index_.find_orphans(1 + below(random_, 9), below(random_, 500));
            for (const std::uint32_t n : nodes) found.push_back(index_.page(n));
            for (const std::uint32_t n : nodes) index_.remove(n, true);
            gone(found);
        }
    }

    void take_extent() {
        const std::uint32_t extent = below(random_, 15);
        for (const std::uint32_t n : index_.in_extent(0, extent)) index_.remove(n, true);
        std::erase_if(pages_, [&](const auto& other) { return other.second.folder == 0 && other.second.extent == extent; });
    }

    /// Records of another writer, some of them damaged: each is taken, counted, or waited for.
    void log() {
        std::vector<std::uint8_t> records;
        const std::uint32_t count = below(random_, 20);
        std::size_t damaged = 0;
        for (std::uint32_t i = 0; i < count; ++i) {
            const Name name = this->name();
            const std::uint32_t place = below(random_, 600);
            const Known known{2, place / 40, place % 40, ++generation_, ++now_, false};
            const Page page{space_of(name.first), key_of(name.second), parent_of(name.second), 2, known.extent,
                            known.slot, known.generation, known.seconds * SECOND, false, 0};
            const bool stored = below(random_, 3) != 0, whole = below(random_, 6) != 0;
            records.resize(records.size() + RECORD_BYTES);
            std::uint8_t* record = &records[records.size() - RECORD_BYTES];
            stored ? write_stored(page, record) : write_removed(page, 0, record);
            if (!whole) {
                record[below(random_, 112)] ^= 1u << below(random_, 8);
                ++damaged;
                continue;
            }
            const auto there = pages_.find(name);
            if (stored) {
                if (there != pages_.end() && there->second.folder != 2 && (there->second.own || usable(name))) continue;
                took(name, known);
            } else if (there != pages_.end() && there->second.folder == 2 && there->second.extent == known.extent &&
                       there->second.slot == known.slot) {
                pages_.erase(there);
            }
        }
        const Applied applied = apply_log(index_, 2, records, false);
        CHECK(applied.bytes == records.size() && applied.damaged == damaged && applied.extents_gone.empty());
    }

    /// In steps of any size, with pages going between them.
    void adopt_all(const Numbers& folders) {
        Adoption adoption(folders);
        while (!index_.gather(adoption, 1 + below(random_, 200))) {}
        adoption.sort();
        remove();
        while (!index_.adopt(adoption, 1 + below(random_, 60))) remove();
    }

    void adopt() {
        const std::uint32_t folder = below(random_, 3);
        adopt_all({folder, folder});
        for (auto& [name, known] : pages_) known.own = known.own || known.folder == folder;
    }

    void snapshot() {
        const std::uint32_t folder = below(random_, 3);
        Snapshot taken = index_.snapshot(folder);
        taken.sort();
        for (int i = 0; i < 10; ++i) {
            insert();
            remove();
        }
        std::size_t there = 0;
        for (const Captured& page : taken.pages)
            if (index_.still_there(taken, page)) {
                CHECK(index_.page(page.node).generation == page.generation);
                ++there;
            }
        CHECK(there <= taken.pages.size() && there + 20 >= taken.pages.size());
    }

    Index index_;
    Random random_;
    std::map<Name, Known> pages_;
    std::vector<std::pair<std::uint32_t, std::uint64_t>> readers_;
    std::uint64_t oldest_[3] = {0, 0, 0};
    std::size_t held_[3] = {0, 0, 0};
    std::uint64_t generation_ = 0, now_ = 0;
};

/// One thread compacts: captures and encodes under the lock, sorts without it. Others store and evict.
void compact_beside_serving() {
    Index index(Policy::Credit);
    std::mutex lock;
    std::atomic<bool> stop{false};
    std::thread compactor([&] {
        while (!stop) {
            Snapshot taken;
            {
                const std::lock_guard held(lock);
                taken = index.snapshot(0);
            }
            taken.sort();
            for (std::size_t at = 0; at < taken.pages.size(); at += 64) {
                const std::lock_guard held(lock);
                for (std::size_t i = at; i < std::min(at + 64, taken.pages.size()); ++i) {
                    std::uint8_t record[RECORD_BYTES];
                    if (index.still_there(taken, taken.pages[i])) write_stored(index.page(taken.pages[i].node), record);
                }
            }
        }
    });
    std::vector<std::thread> writers;
    for (std::uint32_t writer = 0; writer < 2; ++writer)
        writers.emplace_back([&, writer] {
            for (std::uint32_t name = 1; name < 5000; ++name) {
                const std::lock_guard held(lock);
                Page old;
                bool replaced;
                index.insert({space_of(writer), key_of(name), parent_of(name), 0, writer, name % 2000, name, 0, true, 0},
                             false, &old, &replaced);
                if (name > 1500) index.evict(space_of(writer), 1, {});
            }
        });
    for (std::thread& writer : writers) writer.join();
    stop = true;
    compactor.join();
    CHECK(index.size() != 0);
}

}  // namespace

int main() {
    std::uint32_t seed = 0;
    for (const Policy policy : {Policy::Lru, Policy::S3Fifo, Policy::Credit})
        for (int run = 0; run < 4; ++run) {
            Pair pair(policy, ++seed);
            for (int step = 0; step < 4000; ++step) {
                pair.step();
                if (step % 20 == 0) pair.check();
            }
            pair.finish();
        }
    compact_beside_serving();
    std::puts("index: ok");
    return 0;
}
