// The class hicache_ext._native.Index: argument checks and conversions, nothing else.
//
// Pages cross as packed keys and arrays; a tuple per page only where few are told of at a time (victims, replaced
// copies, the pages of one extent).
#include "index/module.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "index/index.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace hicache::index {

namespace {

template <class T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using MaybeBytes = std::optional<nb::bytes>;

std::span<const std::uint8_t> packed(const nb::bytes& keys) {
    if (keys.size() % KEY_BYTES != 0) throw std::invalid_argument("packed keys have 32 bytes each");
    return {reinterpret_cast<const std::uint8_t*>(keys.data()), keys.size()};
}

Key one_key(const nb::bytes& key) {
    if (key.size() != KEY_BYTES) throw std::invalid_argument("a key has 32 bytes");
    return Key::from(key.data());
}

Digest digest(const nb::bytes& space) {
    if (space.size() != SPACE_BYTES) throw std::invalid_argument("a namespace has 16 bytes");
    Digest result;
    std::memcpy(result.data(), space.data(), SPACE_BYTES);
    return result;
}

template <class T>
void check_size(const Array<T>& array, std::size_t size) {
    if (array.shape(0) != size) throw std::invalid_argument("an array has another length than the batch");
}

nb::bytes key_bytes(const Key& key) { return nb::bytes(key.words.data(), KEY_BYTES); }

nb::tuple told(const Page& page) {
    return nb::make_tuple(nb::bytes(page.space.data(), SPACE_BYTES), key_bytes(page.key), key_bytes(page.parent),
                          page.folder, page.extent, page.slot, page.generation, page.own, page.time_ns, page.pins);
}

Page heard(const nb::tuple& page) {
    return {digest(nb::cast<nb::bytes>(page[0])), one_key(nb::cast<nb::bytes>(page[1])),
            one_key(nb::cast<nb::bytes>(page[2])), nb::cast<std::uint32_t>(page[3]),
            nb::cast<std::uint32_t>(page[4]), nb::cast<std::uint32_t>(page[5]),
            nb::cast<std::uint64_t>(page[6]), nb::cast<std::uint64_t>(page[8]), nb::cast<bool>(page[7]), 0};
}

nb::object told_or_none(const Index& index, std::uint32_t n) { return n == NONE ? nb::none() : nb::object(told(index.page(n))); }

nb::list told_all(const Index& index, const Numbers& nodes) {
    nb::list pages;
    for (const std::uint32_t n : nodes) pages.append(told(index.page(n)));
    return pages;
}

Policy policy(const std::string& name) {
    if (name == "lru") return Policy::Lru;
    if (name == "s3fifo") return Policy::S3Fifo;
    if (name == "credit") return Policy::Credit;
    throw std::invalid_argument("no such order: " + name);
}

const std::uint8_t* parents_of(const MaybeBytes& parents, std::size_t bytes) {
    if (!parents) return nullptr;
    if (parents->size() != bytes) throw std::invalid_argument("parents are as many as keys");
    return reinterpret_cast<const std::uint8_t*>(parents->data());
}

/// The pages that a batch uses: the parent of its first, whose chain is in use even when none of the batch is here,
/// and those that were found.
Numbers used_nodes(Index& index, const Digest& space, const std::uint8_t* parents, const Numbers& found) {
    Numbers nodes;
    nodes.reserve(found.size() + 1);
    if (parents != nullptr && !found.empty()) nodes.push_back(index.find(space, Key::from(parents)));
    nodes.insert(nodes.end(), found.begin(), found.end());
    return nodes;
}

void lookup(Index& index, const nb::bytes& space, const nb::bytes& keys, const MaybeBytes& parents,
            const Array<std::uint8_t>& out, bool used) {
    const Digest name = digest(space);
    const auto wanted = packed(keys);
    const std::uint8_t* above = parents_of(parents, wanted.size());
    check_size(out, wanted.size() / KEY_BYTES);
    Numbers found;
    index.lookup(name, wanted, above, found);
    for (std::size_t i = 0; i < found.size(); ++i) out.data()[i] = found[i] != NONE;
    index.touch(name, used_nodes(index, name, above, found), used);
}

void pin(Index& index, const nb::bytes& space, const nb::bytes& keys, const MaybeBytes& parents,
         const Array<std::uint32_t>& handles, const Array<std::uint32_t>& folders, const Array<std::uint32_t>& extents,
         const Array<std::uint32_t>& slots, const Array<std::uint8_t>& own, bool touch) {
    const Digest name = digest(space);
    const auto wanted = packed(keys);
    const std::uint8_t* above = parents_of(parents, wanted.size());
    for (const auto* array : {&handles, &folders, &extents, &slots}) check_size(*array, wanted.size() / KEY_BYTES);
    check_size(own, wanted.size() / KEY_BYTES);
    Numbers found;
    index.lookup(name, wanted, nullptr, found);
    for (std::size_t i = 0; i < found.size(); ++i) {
        handles.data()[i] = NONE;
        if (found[i] == NONE) continue;
        const Page page = index.page(found[i]);
        handles.data()[i] = index.pins().take(found[i]);
        folders.data()[i] = page.folder;
        extents.data()[i] = page.extent;
        slots.data()[i] = page.slot;
        own.data()[i] = page.own;
    }
    if (touch) index.touch(name, used_nodes(index, name, above, found), false);
}

nb::bytes unpin(Index& index, const std::vector<std::uint32_t>& handles) {
    std::string freed(handles.size(), '\0');
    for (std::size_t i = 0; i < handles.size(); ++i) freed[i] = static_cast<char>(index.pins().give(handles[i]));
    return nb::bytes(freed.data(), freed.size());
}

nb::object insert(Index& index, const nb::tuple& page, bool oldest) {
    Page old;
    bool replaced;
    index.insert(heard(page), oldest, &old, &replaced);
    return replaced ? nb::object(told(old)) : nb::none();
}

bool remove(Index& index, const nb::tuple& page, bool evicted) {
    const std::uint32_t n = index.same(heard(page));
    if (n != NONE) index.remove(n, evicted);
    return n != NONE;
}

/// Pages that were removed, and their log records.
nb::tuple removed(const std::vector<Page>& gone, std::uint64_t time_ns) {
    nb::list pages;
    std::string records(gone.size() * RECORD_BYTES, '\0');
    for (std::size_t i = 0; i < gone.size(); ++i) {
        pages.append(told(gone[i]));
        write_removed(gone[i], time_ns, reinterpret_cast<std::uint8_t*>(&records[i * RECORD_BYTES]));
    }
    return nb::make_tuple(pages, nb::bytes(records.data(), records.size()));
}

nb::tuple forget(Index& index, const nb::list& pages, bool evicted, std::uint64_t time_ns) {
    std::vector<Page> gone;
    for (const nb::handle page : pages) {
        const std::uint32_t n = index.same(heard(nb::cast<nb::tuple>(page)));
        if (n == NONE) continue;
        gone.push_back(index.page(n));
        index.remove(n, evicted);
    }
    return removed(gone, time_ns);
}

/// Own pages that were just written: (pages whose place they took, their log records).
nb::tuple publish(Index& index, const nb::bytes& space, const nb::bytes& keys, const MaybeBytes& parents,
                  std::uint32_t folder, const std::vector<std::uint32_t>& extents,
                  const std::vector<std::uint32_t>& slots, const std::vector<std::uint64_t>& generations,
                  std::uint64_t time_ns) {
    const Digest name = digest(space);
    const auto wanted = packed(keys);
    const std::uint8_t* above = parents_of(parents, wanted.size());
    const std::size_t count = wanted.size() / KEY_BYTES;
    if (extents.size() != count || slots.size() != count || generations.size() != count)
        throw std::invalid_argument("an array has another length than the batch");
    nb::list replaced;
    std::string records(count * RECORD_BYTES, '\0');
    Numbers nodes;
    for (std::size_t i = 0; i < count; ++i) {
        Page page{name, Key::from(&wanted[i * KEY_BYTES]), {}, folder, extents[i], slots[i],
                  generations[i], time_ns, true, 0};
        if (above != nullptr) page.parent = Key::from(above + i * KEY_BYTES);
        Page old;
        bool was_there;
        nodes.push_back(index.insert(page, false, &old, &was_there));
        if (was_there) replaced.append(told(old));
        write_stored(page, reinterpret_cast<std::uint8_t*>(&records[i * RECORD_BYTES]));
    }
    index.touch(name, nodes, false);
    return nb::make_tuple(replaced, nb::bytes(records.data(), records.size()));
}

nb::bytes keys_of(const Index& index, const Numbers& nodes) {
    std::string keys(nodes.size() * KEY_BYTES, '\0');
    for (std::size_t i = 0; i < nodes.size(); ++i) {
        const Key key = index.page(nodes[i]).key;
        std::memcpy(&keys[i * KEY_BYTES], key.words.data(), KEY_BYTES);
    }
    return nb::bytes(keys.data(), keys.size());
}

Numbers nodes_of(const Index& index, const nb::bytes& space, const nb::bytes& keys) {
    const auto wanted = packed(keys);
    Numbers nodes;
    for (std::size_t at = 0; at < wanted.size(); at += KEY_BYTES) {
        nodes.push_back(index.find(digest(space), Key::from(&wanted[at])));
        if (nodes.back() == NONE) nodes.pop_back();
    }
    return nodes;
}

void touch(Index& index, const nb::bytes& space, const nb::bytes& keys, bool used) {
    index.touch(digest(space), nodes_of(index, space, keys), used);
}

nb::bytes snapshot_records(const Index& index, const Snapshot& snapshot, std::size_t start, std::size_t count) {
    std::string records;
    const std::size_t end = std::min(snapshot.pages.size(), start + std::min(count, snapshot.pages.size()));
    for (std::size_t i = start; i < end; ++i) {
        if (!index.still_there(snapshot, snapshot.pages[i])) continue;
        std::uint8_t record[RECORD_BYTES];
        write_stored(index.page(snapshot.pages[i].node), record);
        records.append(reinterpret_cast<const char*>(record), RECORD_BYTES);
    }
    return nb::bytes(records.data(), records.size());
}

nb::bytes own_records(const Index& index, std::optional<std::uint32_t> folder) {
    std::string records;
    {
        Released release;
        Snapshot own = folder ? index.snapshot(*folder) : index.snapshot();
        own.sort();
        records.resize(own.pages.size() * RECORD_BYTES);
        for (std::size_t i = 0; i < own.pages.size(); ++i)
            write_stored(index.page(own.pages[i].node), reinterpret_cast<std::uint8_t*>(&records[i * RECORD_BYTES]));
    }
    return nb::bytes(records.data(), records.size());
}

nb::tuple apply(Index& index, std::uint32_t folder, const nb::bytes& records, bool at_end) {
    const std::span data(reinterpret_cast<const std::uint8_t*>(records.data()), records.size());
    Applied applied;
    {
        Released release;
        applied = apply_log(index, folder, data, at_end);
    }
    return nb::make_tuple(applied.bytes, applied.damaged, applied.extents_gone);
}

}  // namespace

void bind(nb::module_& m) {
    nb::class_<Snapshot>(m, "Snapshot", "The own pages of a folder at one moment; see storage_backends.local.index.")
        .def("__len__", [](const Snapshot& snapshot) { return snapshot.pages.size(); })
        .def("sort", &Snapshot::sort, nb::call_guard<Released>());
    nb::class_<Adoption>(m, "Adoption", "Folders that become ours; see storage_backends.local.index.")
        .def("__init__", [](Adoption* self, const Numbers& folders) { new (self) Adoption(folders); })
        .def("sort", &Adoption::sort, nb::call_guard<Released>());
    nb::class_<Index>(m, "Index", "Pages of the local tier by key and by place; see storage_backends.local.index.")
        .def("__init__", [](Index* self, const std::string& order) { new (self) Index(policy(order)); })
        .def("__len__", &Index::size)
        .def("memory", &Index::bytes, "Bytes in use.")
        .def("lookup", &lookup)
        .def("pin", &pin)
        .def("unpin", &unpin)
        .def("pinned", [](Index& index, std::uint32_t handle) { return told(index.pinned(handle)); })
        .def("fail", [](Index& index, std::uint32_t handle) { return index.pins().fail(handle); })
        .def("get", [](Index& index, const nb::bytes& space, const nb::bytes& key) {
            return told_or_none(index, index.find(digest(space), one_key(key))); })
        .def("has", [](Index& index, const nb::bytes& space, const nb::bytes& key) {
            const std::uint32_t n = index.find(digest(space), one_key(key));
            return n != NONE && !index.expired(n); })
        .def("at", [](Index& index, std::uint32_t folder, std::uint32_t extent, std::uint32_t slot) {
            return told_or_none(index, index.at(folder, extent, slot)); })
        .def("insert", &insert)
        .def("remove", &remove)
        .def("forget", &forget)
        .def("publish", &publish)
        .def("link", [](Index& index, const nb::bytes& space, const nb::bytes& key, const nb::bytes& parent) {
            const std::uint32_t n = index.find(digest(space), one_key(key));
            if (n != NONE) index.link(n, one_key(parent)); })
        .def("touch", &touch)
        .def("protect", [](Index& index, const nb::bytes& space, const nb::bytes& keys) {
            index.protect(digest(space), packed(keys)); })
        .def("victim", [](Index& index, const nb::bytes& space) {
            return told_or_none(index, index.victim(digest(space))); })
        .def("evict", [](Index& index, const nb::bytes& space, std::size_t count, const nb::bytes& keys, std::uint64_t time_ns) {
            return removed(index.evict(digest(space), count, packed(keys)), time_ns); })
        .def("going", [](Index& index, const nb::bytes& space, std::size_t count, std::size_t examine) {
            return keys_of(index, index.going(digest(space), count, examine)); })
        .def("set_oldest", [](Index& index, const nb::bytes& space, std::uint64_t time_ns) {
            index.set_oldest(digest(space), time_ns); })
        .def("expired", [](Index& index, const nb::bytes& space, std::size_t limit, std::size_t examine) {
            return told_all(index, index.expired(digest(space), limit, examine)); })
        .def("set_capacity", [](Index& index, const nb::bytes& space, std::uint64_t pages) {
            index.set_capacity(digest(space), pages); })
        .def("touched", [](Index& index, const nb::bytes& space) { return index.touched(digest(space)); })
        .def("ancestors", [](Index& index, const nb::bytes& space, const nb::bytes& key) {
            return keys_of(index, index.ancestors(digest(space), one_key(key))); })
        .def("orphans", &Index::orphans)
        .def("sweep_orphans", [](Index& index, std::size_t limit, std::size_t examine) {
            return told_all(index, index.find_orphans(limit, examine)); }, nb::arg("limit"), nb::arg("examine") = 4096)
        .def("in_extent", [](Index& index, std::uint32_t folder, std::uint32_t extent) {
            return told_all(index, index.in_extent(folder, extent)); })
        .def("used_slots", [](Index& index, std::uint32_t folder, std::uint32_t extent) {
            const Numbers slots = index.used_slots(folder, extent);
            return nb::bytes(slots.data(), slots.size() * sizeof(slots[0])); })
        .def("extents", &Index::extents)
        .def("trim", [](Index& index, std::uint32_t folder, std::uint32_t extent, const nb::bytes& space, std::uint32_t slots) {
            const Digest name = digest(space);
            for (const std::uint32_t n : index.in_extent(folder, extent))
                if (const Page page = index.page(n); page.slot >= slots || page.space != name) index.remove(n, false); })
        .def("drop", [](Index& index, std::uint32_t folder, const MaybeBytes& space) {
            for (const std::uint32_t n : index.in_folder(folder))
                if (!space || index.page(n).space == digest(*space)) index.remove(n, false); })
        .def("newest_generation", &Index::newest_generation)
        .def("last_used", [](Index& index, std::uint32_t folder, std::uint32_t extent) { return index.last_used(folder, extent); })
        .def("gather", &Index::gather, nb::call_guard<Released>())
        .def("adopt", &Index::adopt, nb::call_guard<Released>())
        .def("own_records", &own_records, nb::arg("folder") = nb::none())
        .def("snapshot", [](const Index& index, std::uint32_t folder) { return index.snapshot(folder); },
             nb::call_guard<Released>())
        .def("snapshot_records", &snapshot_records)
        .def("apply_log", &apply);
}

}  // namespace hicache::index
