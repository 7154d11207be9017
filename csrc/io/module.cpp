// The Python module hicache_ext._io: arrays to batches, ends to bytes, and the release of the GIL. Nothing else.
//
// Memory comes in as addresses and lengths; whoever calls keeps it alive until the page's end came out of reap().
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <unordered_map>

#include "io/engine.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace {

using hicache::Released;
using hicache::io::Batch;
using hicache::io::Ended;
using hicache::io::Engine;
using hicache::io::Options;
using hicache::io::Page;
using hicache::io::Slots;
using hicache::io::SlotShape;
using hicache::io::Verdict;

template <typename T, std::size_t Dimensions>
using In = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using U64s = In<std::uint64_t, 1>;
using Pairs = In<std::uint64_t, 2>;

[[noreturn]] void wrong(const char* what) { throw std::invalid_argument(what); }

const std::uint8_t* at(std::uint64_t address) { return reinterpret_cast<const std::uint8_t*>(address); }

std::vector<iovec> buffers_of(const Pairs& iov) {
    if (iov.shape(1) != 2) wrong("iov must be uint64[m, 2]");
    std::vector<iovec> buffers(iov.shape(0));
    static_assert(sizeof(iovec) == 16);
    if (!buffers.empty()) std::memcpy(buffers.data(), iov.data(), 16 * buffers.size());
    return buffers;
}

bool submit(Engine& engine, std::uint64_t token, const In<std::int32_t, 1>& fds, const In<std::uint8_t, 1>& writes,
            const U64s& offsets, const U64s& starts, const Pairs& iov, const U64s& cancelled) {
    const std::size_t pages = fds.shape(0);
    if (writes.shape(0) != pages || offsets.shape(0) != pages || cancelled.shape(0) != pages ||
        starts.shape(0) != pages + 1)
        wrong("one of each per transfer, and one more of starts");
    const auto batch = std::make_shared<Batch>();
    batch->token = token;
    batch->buffers = buffers_of(iov);
    batch->pages.resize(pages);
    for (std::size_t i = 0; i < pages; ++i) {
        const std::uint64_t first = starts.data()[i], last = starts.data()[i + 1];
        if (first > last || last > batch->buffers.size()) wrong("starts must ascend within iov");
        Page& page = batch->pages[i];
        page.fd = fds.data()[i];
        page.write = writes.data()[i] != 0;
        page.first = static_cast<std::uint32_t>(first);
        page.count = static_cast<std::uint32_t>(last - first);
        page.offset = offsets.data()[i];
        page.cancelled = at(cancelled.data()[i]);
    }
    Released release;  // it wakes threads, which may take this one's processor at once
    return engine.submit(batch);
}

SlotShape shape_of(const nb::bytes& name_space, std::uint64_t header_bytes, const U64s& lengths) {
    SlotShape shape;
    if (name_space.size() != shape.name_space.size()) wrong("a namespace has 16 bytes");
    std::memcpy(shape.name_space.data(), name_space.c_str(), shape.name_space.size());
    shape.header_bytes = header_bytes;
    shape.lengths.assign(lengths.data(), lengths.data() + lengths.shape(0));
    if (!shape.fits()) wrong("a header of this size cannot hold the checksums of these lengths");
    return shape;
}

bool submit_slots(Engine& engine, std::uint64_t token, bool write, const nb::bytes& name_space, const nb::bytes& keys,
                  std::uint64_t header_bytes, const U64s& lengths, const In<std::int32_t, 1>& fds, const U64s& files,
                  const U64s& offsets, const Pairs& iov, const U64s& copies, std::uint64_t cancelled) {
    const std::size_t pages = fds.shape(0), buffers = lengths.shape(0);
    const auto batch = std::make_shared<Batch>();
    Slots& slots = batch->slots.emplace();
    slots.shape = shape_of(name_space, header_bytes, lengths);
    if (keys.size() != 32 * pages || files.shape(0) != pages || offsets.shape(0) != pages)
        wrong("one of each per page, and 32 bytes of key");
    const bool bounced = copies.shape(0) != 0;
    if (bounced && copies.shape(0) != pages * buffers) wrong("copies must name every buffer of every page, or none");
    const std::size_t per_page = bounced ? 1 : 1 + buffers;
    batch->token = token;
    batch->buffers = buffers_of(iov);
    if (batch->buffers.size() != pages * per_page) wrong("iov must have the header and every buffer of every page");
    const auto* key = reinterpret_cast<const std::uint8_t*>(keys.c_str());
    slots.keys.assign(key, key + keys.size());
    slots.copies.resize(copies.shape(0));
    for (std::size_t i = 0; i < slots.copies.size(); ++i)
        slots.copies[i] = reinterpret_cast<std::uint8_t*>(copies.data()[i]);
    batch->pages.resize(pages);
    for (std::size_t i = 0; i < pages; ++i) {
        const iovec* buffer = batch->buffers.data() + i * per_page;
        if (bounced && buffer->iov_len < header_bytes + slots.shape.payload_bytes()) wrong("a bounce buffer is too small");
        if (!bounced && buffer->iov_len != header_bytes) wrong("a page's first buffer is its header");
        for (std::size_t j = 0; !bounced && j < buffers; ++j)
            if (buffer[1 + j].iov_len != slots.shape.lengths[j]) wrong("a buffer differs from `lengths`");
        batch->pages[i] = {fds.data()[i], write,           static_cast<std::uint32_t>(i * per_page),
                           static_cast<std::uint32_t>(per_page), offsets.data()[i], files.data()[i], at(cancelled)};
    }
    Released release;  // it wakes threads, which may take this one's processor at once
    return engine.submit(batch);
}

nb::object reap(Engine& engine) {
    std::vector<Ended> ended;
    {
        Released release;
        ended = engine.reap();
    }
    if (ended.empty()) return nb::none();
    struct Group {
        std::uint64_t token;
        std::vector<std::uint32_t> pages;
        std::vector<std::int64_t> moved;
        std::vector<std::uint8_t> verdicts;
    };
    std::vector<Group> groups;
    std::unordered_map<std::uint64_t, std::size_t> known;
    for (const Ended& end : ended) {
        const auto [found, fresh] = known.try_emplace(end.token, groups.size());
        if (fresh) groups.push_back({end.token, {}, {}, {}});
        Group& group = groups[found->second];
        group.pages.push_back(end.page);
        group.moved.push_back(end.moved);
        group.verdicts.push_back(static_cast<std::uint8_t>(end.verdict));
    }
    nb::list result;
    for (const Group& group : groups)
        result.append(nb::make_tuple(group.token, nb::bytes(group.pages.data(), 4 * group.pages.size()),
                                     nb::bytes(group.moved.data(), 8 * group.moved.size()),
                                     nb::bytes(group.verdicts.data(), group.verdicts.size())));
    return result;
}

int verify(const nb::bytes& name_space, const nb::bytes& key, std::uint64_t header, std::uint64_t header_bytes,
           const U64s& addresses, const U64s& lengths, std::uint64_t moved) {
    const SlotShape shape = shape_of(name_space, header_bytes, lengths);
    if (key.size() != 32) wrong("a key has 32 bytes");
    if (addresses.shape(0) != lengths.shape(0)) wrong("addresses and lengths differ in size");
    std::vector<const std::uint8_t*> payload;
    for (std::size_t i = 0; i < addresses.shape(0); ++i) payload.push_back(at(addresses.data()[i]));
    Released release;
    return static_cast<int>(hicache::io::verify(shape, reinterpret_cast<const std::uint8_t*>(key.c_str()), at(header),
                                                payload, moved));
}

}  // namespace

NB_MODULE(_io, m) {
    nb::set_leak_warnings(false);  // an engine that is still open at exit is the user's right
    nb::exception<hicache::io::Unavailable>(m, "Unavailable");
    nb::class_<Engine>(m, "Engine")
        .def(
            "__init__",
            [](Engine* self, unsigned threads, unsigned depth, bool sqpoll, bool iopoll) {
                if (threads == 0 || threads > 64 || depth == 0 || depth > 1024) wrong("threads 1..64, depth 1..1024");
                new (self) Engine(Options{threads, depth, sqpoll, iopoll});
            },
            nb::arg("threads"), nb::arg("depth"), nb::arg("sqpoll") = false, nb::arg("iopoll") = false)
        // noconvert: a wrong dtype is the caller's mistake, and a silent copy would hide it.
        .def("submit", &submit, nb::arg("token"), nb::arg("fds").noconvert(), nb::arg("writes").noconvert(),
             nb::arg("offsets").noconvert(), nb::arg("starts").noconvert(), nb::arg("iov").noconvert(),
             nb::arg("cancelled").noconvert(), "Transfers as they are. False: closed, and none was taken.")
        .def("submit_slots", &submit_slots, nb::arg("token"), nb::arg("write"), nb::arg("name_space"), nb::arg("keys"),
             nb::arg("header_bytes"), nb::arg("lengths").noconvert(), nb::arg("fds").noconvert(),
             nb::arg("files").noconvert(), nb::arg("offsets").noconvert(), nb::arg("iov").noconvert(),
             nb::arg("copies").noconvert(), nb::arg("cancelled"),
             "Slots, sealed before they are written or judged when read. False: closed, and none was taken.")
        .def("reap", &reap,
             "Waits for ends: a list of (token, pages uint32, moved int64, verdicts uint8), or None after "
             "stop_reaping(). For one thread.")
        .def("stop_reaping", &Engine::stop_reaping)
        .def("close", &Engine::close, nb::arg("seconds"), nb::call_guard<Released>())
        .def("register_memory", &Engine::register_memory, nb::arg("address"), nb::arg("length"),
             nb::call_guard<Released>())
        .def("retain", &Engine::retain, nb::arg("files"))
        .def_prop_ro("registered_bytes", &Engine::registered_bytes)
        .def_prop_ro("description", &Engine::description);
    m.def("verify", &verify, nb::arg("name_space"), nb::arg("key"), nb::arg("header"), nb::arg("header_bytes"),
          nb::arg("addresses").noconvert(), nb::arg("lengths").noconvert(), nb::arg("moved"),
          "The engine's judgement of a slot that lies in memory, as a number.");
}
