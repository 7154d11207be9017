// The Python module hicache_ext._cuda: argument checks and the release of the GIL, nothing else.
//
// Memory comes in as addresses, streams as the numbers of their handles: no torch, no CUDA library is linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>

#include "device.hpp"
#include "fatbin.hpp"
#include "gds/module.hpp"
#include "lane.hpp"
#include "released.hpp"
#include "route.hpp"

namespace nb = nanobind;

namespace {

using hicache::Released;
using namespace hicache::cuda;

using U64In = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using I64In = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U32In = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U32Out = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Stream stream_of(std::uint64_t handle) { return reinterpret_cast<Stream>(handle); }

std::vector<std::uint64_t> taken(const U64In& array) { return {array.data(), array.data() + array.shape(0)}; }

Blocks blocks_of(const U64In& a_planes, const U64In& b_planes, std::uint32_t tokens, std::uint32_t heads,
                 std::uint64_t run, std::int64_t a_token, std::int64_t a_head, std::int64_t b_token,
                 std::int64_t b_head) {
    if (a_planes.shape(0) != b_planes.shape(0) || a_planes.shape(0) == 0)
        throw std::invalid_argument("both sides need the same planes, and at least one");
    if (tokens == 0 || heads == 0 || run == 0) throw std::invalid_argument("tokens, heads and run start at 1");
    if (a_token < 0 || a_head < 0 || b_token < 0 || b_head < 0) throw std::invalid_argument("strides start at 0");
    return Blocks{Side{taken(a_planes), a_token, a_head}, Side{taken(b_planes), b_token, b_head}, tokens, heads, run};
}

struct PageRange {
    std::uint64_t stride, count;
};

struct PyRoute {
    std::shared_ptr<Device> device;
    Route route;
    PageRange a_range, b_range;

    std::vector<std::uint64_t> offsets(const PageRange& range, const I64In& numbers, std::size_t count) const {
        if (numbers.shape(0) != count)
            throw std::invalid_argument(std::to_string(count) + " pages cannot be matched with " +
                                        std::to_string(numbers.shape(0)));
        std::vector<std::uint64_t> found(count);
        for (std::size_t i = 0; i < count; ++i) {
            const auto number = static_cast<std::uint64_t>(numbers.data()[i]);
            if (number >= range.count)
                throw std::out_of_range("page " + std::to_string(numbers.data()[i]) + " was asked for and there are " +
                                        std::to_string(range.count));
            found[i] = number * range.stride;
        }
        return found;
    }

    void go(int way, const Route::Pages& pages, Stream stream, unsigned blocks, bool batch, Stage* stage) const {
        switch (way) {
            case 0: return route.by_engine(pages, stream, batch);
            case 1: return route.by_kernel(pages, stream, blocks);
            case 2: return route.by_stage(pages, stream, blocks, *stage);
        }
        throw std::invalid_argument("ways are 0 (engine), 1 (kernel) and 2 (stage)");
    }

    void copy(int way, bool to_b, const I64In& a, const I64In& b, std::uint64_t handle, unsigned blocks, bool batch,
              std::shared_ptr<Stage> stage) const {
        const auto at_a = offsets(a_range, a, a.shape(0)), at_b = offsets(b_range, b, a.shape(0));
        if (way == 2 && stage == nullptr) throw std::invalid_argument("this way needs a stage");
        if (at_a.empty()) return;
        const Route::Pages all{to_b, 0, route.blocks().a.planes.size(), at_a.data(), at_b.data(), at_a.size()};
        Released release;
        try {
            go(way, all, stream_of(handle), blocks, batch, stage.get());
        } catch (const Failed&) {
            settle(*device, stream_of(handle), stage.get());
            throw;
        }
    }

    void copy_layers(int way, bool to_b, const I64In& a, const I64In& b, std::size_t planes_of_layer,
                     std::uint64_t handle, unsigned blocks, bool batch, std::shared_ptr<Events> events) const {
        const std::size_t known = route.blocks().a.planes.size();
        if (way == 2) throw std::invalid_argument("a stage takes all layers at once");
        if (planes_of_layer == 0 || known % planes_of_layer != 0 || events->size() != known / planes_of_layer)
            throw std::invalid_argument("there must be an event for each layer");
        const auto at_a = offsets(a_range, a, a.shape(0)), at_b = offsets(b_range, b, a.shape(0));
        Route::Pages all{to_b, 0, planes_of_layer, at_a.data(), at_b.data(), at_a.size()};
        Released release;
        const Stream stream = stream_of(handle);
        try {
            events->reset();
            for (std::size_t layer = 0; layer < events->size(); ++layer) {
                all.first = layer * planes_of_layer;
                if (all.count != 0) go(way, all, stream, blocks, batch, nullptr);
                Device::Entered entered(*device);
                events->record(layer, stream);
            }
        } catch (...) {
            events->reset();  // no layer of a load that failed may be waited for
            settle(*device, stream, nullptr);
            throw;
        }
    }
};

nb::list runs(const Blocks& blocks, bool to_b, const U64In& a, const U64In& b, std::size_t first, std::size_t planes) {
    if (a.shape(0) != b.shape(0)) throw std::invalid_argument("both sides need the same pages");
    if (first + planes > blocks.a.planes.size()) throw std::invalid_argument("there are fewer planes");
    nb::list out;
    for (const Run& run : blocks.runs(to_b, first, planes, a.data(), b.data(), a.shape(0)))
        out.append(nb::make_tuple(run.from, run.to, run.bytes));
    return out;
}

}  // namespace

NB_MODULE(_cuda, m) {
    nb::set_leak_warnings(false);  // devices stay open until the process ends
    nb::exception<Unavailable>(m, "Unavailable");
    nb::exception<Failed>(m, "Failed");
    m.attr("kernels_built") = fatbin() != nullptr;

    nb::class_<Device>(m, "Device", "One GPU, by the driver alone. Unavailable where there is none.")
        .def_prop_ro("ordinal", [](const Device& d) { return d.ordinal; })
        .def_prop_ro("name", [](const Device& d) { return d.name; })
        .def_prop_ro("driver", [](const Device& d) { return d.driver_version; })
        .def_prop_ro("multiprocessors", [](const Device& d) { return d.multiprocessors; })
        .def_prop_ro("capability", [](const Device& d) { return nb::make_tuple(d.major, d.minor); })
        .def_prop_ro("no_kernels", [](const Device& d) { return d.no_kernels; },
                     "Why copy kernels cannot be used; empty when they can.")
        .def_prop_ro("batches", [](const Device& d) { return d.api.copy_batch_async != nullptr; },
                     "Whether the driver has cuMemcpyBatchAsync.")
        .def("make_current", &Device::make_current,
             "Its context is current in this thread from now on, for calls of others that go by that.")
        .def("memory_kind", &Device::memory_kind, nb::arg("address"), nb::arg("length"),
             nb::call_guard<Released>())
        .def("copy",
             [](Device& d, std::uint64_t to, std::uint64_t from, std::size_t bytes) {
                 d.copy(to, from, bytes, "copying");
             },
             nb::arg("to"), nb::arg("from_"), nb::arg("bytes"), nb::call_guard<Released>(),
             "Between any two kinds of memory; waits until it is there.")
        .def("capturing",
             [](const Device& d, std::uint64_t stream) {
                 Device::Entered entered(d);
                 return d.capturing(stream_of(stream));
             },
             nb::arg("stream"))
        .def("crc32c",
             [](Device& d, const U64In& addresses, const U32In& lengths, const U32Out& out, std::uint64_t stream,
                unsigned blocks) {
                 const std::size_t count = addresses.shape(0);
                 if (lengths.shape(0) != count || out.shape(0) != count)
                     throw std::invalid_argument("addresses, lengths and out differ in size");
                 if (count >= std::size_t{1} << 31 || blocks == 0) throw std::invalid_argument("too many chunks");
                 Released release;
                 d.crc32c(addresses.data(), lengths.data(), count, out.data(), stream_of(stream), blocks);
             },
             nb::arg("addresses"), nb::arg("lengths"), nb::arg("out").noconvert(), nb::arg("stream"),
             nb::arg("blocks"));
    m.def("open", [](int ordinal) { return std::make_shared<Device>(ordinal); }, nb::arg("ordinal"),
          nb::call_guard<Released>());

    m.def("current_ordinal", &current_ordinal, "Of the device whose context is current in this thread; -1: none is.");

    nb::class_<DeviceMemory>(m, "Memory", "Device memory, given back with this. Unavailable when there is too little.")
        .def_ro("address", &DeviceMemory::address);
    m.def("memory", [](std::shared_ptr<Device> d, std::size_t bytes) { return std::make_shared<DeviceMemory>(d, bytes); },
          nb::arg("device"), nb::arg("bytes"), nb::call_guard<Released>());

    nb::class_<OwnStream>(m, "Stream", "A stream of our own, which waits for no other.")
        .def_prop_ro("handle", [](const OwnStream& s) { return reinterpret_cast<std::uint64_t>(s.handle); })
        .def("synchronize", &OwnStream::synchronize, nb::call_guard<Released>());
    m.def("stream", [](std::shared_ptr<Device> d) { return std::make_shared<OwnStream>(d); }, nb::arg("device"));

    nb::class_<CopyLane>(m, "CopyLane", "Copies between pinned memory and the device's, with checksums of the latter.")
        .def_prop_ro("mover",
                     [](const CopyLane& lane) { return nb::capsule(&lane.mover(), hicache::memory::kMoverName); },
                     "What a region is given (csrc/memory/mover.hpp). The lane must outlive whatever uses it.")
        .def("move",
             [](CopyLane& lane, const U64In& to, const U64In& from, const U64In& bytes, const U64In& addresses,
                const U32In& lengths, const U32Out& crcs) {
                 const std::size_t count = to.shape(0), chunks = addresses.shape(0);
                 if (from.shape(0) != count || bytes.shape(0) != count)
                     throw std::invalid_argument("to, from and bytes differ in size");
                 if (lengths.shape(0) != chunks || crcs.shape(0) != chunks)
                     throw std::invalid_argument("addresses, lengths and crcs differ in size");
                 std::vector<hicache::memory::Piece> pieces(count);
                 for (std::size_t i = 0; i < count; ++i) pieces[i] = {to.data()[i], from.data()[i], bytes.data()[i]};
                 Released release;
                 lane.move(pieces.data(), count, {addresses.data(), lengths.data(), crcs.data(), chunks, false});
             },
             nb::arg("to"), nb::arg("from_"), nb::arg("bytes"), nb::arg("addresses"), nb::arg("lengths"),
             nb::arg("crcs").noconvert());
    m.def("copy_lane",
          [](std::shared_ptr<Device> d, unsigned blocks) { return std::make_shared<CopyLane>(std::move(d), blocks); },
          nb::arg("device"), nb::arg("blocks"), nb::call_guard<Released>());

    nb::class_<Stage>(m, "Stage", "Device memory between a kernel and the copy engines.")
        .def_prop_ro("half_bytes", [](const Stage& s) { return s.half_bytes; });
    m.def("stage", [](std::shared_ptr<Device> d, std::size_t half) { return std::make_shared<Stage>(d, half); },
          nb::arg("device"), nb::arg("half_bytes"), nb::call_guard<Released>());

    nb::class_<Events>(m, "Events", "Ends of layers, in order.")
        .def("__len__", &Events::size)
        .def("reset", &Events::reset)
        .def("wait",
             [](const Events& e, std::uint64_t stream, std::size_t layer) { e.wait(stream_of(stream), layer); },
             nb::arg("stream"), nb::arg("layer"))
        .def("done", &Events::done, nb::arg("layer"))
        .def("synchronize", &Events::synchronize, nb::arg("layer"), nb::call_guard<Released>());
    m.def("events", [](std::shared_ptr<Device> d, std::size_t n) { return std::make_shared<Events>(d, n); },
          nb::arg("device"), nb::arg("count"));

    nb::class_<PyRoute>(m, "Route", "Blocks between two sides; see route.hpp.")
        .def("copy", &PyRoute::copy, nb::arg("way"), nb::arg("to_b"), nb::arg("a_pages"), nb::arg("b_pages"),
             nb::arg("stream"), nb::arg("blocks"), nb::arg("batch"), nb::arg("stage").none())
        .def("copy_layers", &PyRoute::copy_layers, nb::arg("way"), nb::arg("to_b"), nb::arg("a_pages"),
             nb::arg("b_pages"), nb::arg("planes_of_layer"), nb::arg("stream"), nb::arg("blocks"), nb::arg("batch"),
             nb::arg("events"));
    m.def("route",
          [](std::shared_ptr<Device> device, const U64In& a_planes, const U64In& b_planes, std::uint32_t tokens,
             std::uint32_t heads, std::uint64_t run, std::int64_t a_token, std::int64_t a_head, std::int64_t b_token,
             std::int64_t b_head, std::uint64_t a_page, std::uint64_t a_count, std::uint64_t b_page,
             std::uint64_t b_count, std::uint64_t span_bytes, const U64In& span_starts, const U64In& span_at,
             const U32In& span_of) {
              Blocks blocks = blocks_of(a_planes, b_planes, tokens, heads, run, a_token, a_head, b_token, b_head);
              std::optional<Spans> spans;
              if (span_bytes != 0) {
                  const std::size_t planes = blocks.a.planes.size();
                  if (span_at.shape(0) != planes || span_of.shape(0) != planes || span_starts.shape(0) == 0)
                      throw std::invalid_argument("every plane needs its place in a span");
                  spans = Spans{span_bytes, taken(span_starts), taken(span_at),
                                {span_of.data(), span_of.data() + planes}};
              }
              return std::shared_ptr<PyRoute>(
                  new PyRoute{device, Route(device, std::move(blocks), std::move(spans)), {a_page, a_count},
                              {b_page, b_count}});
          },
          nb::arg("device"), nb::arg("a_planes"), nb::arg("b_planes"), nb::arg("tokens"), nb::arg("heads"),
          nb::arg("run"), nb::arg("a_token"), nb::arg("a_head"), nb::arg("b_token"), nb::arg("b_head"),
          nb::arg("a_page"), nb::arg("a_count"), nb::arg("b_page"), nb::arg("b_count"), nb::arg("span_bytes"), nb::arg("span_starts"), nb::arg("span_at"), nb::arg("span_of"));
    m.def("runs",
          [](const U64In& a_planes, const U64In& b_planes, std::uint32_t tokens, std::uint32_t heads,
             std::uint64_t run, std::int64_t a_token, std::int64_t a_head, std::int64_t b_token, std::int64_t b_head,
             bool to_b, const U64In& a, const U64In& b, std::size_t first, std::size_t planes) {
              return runs(blocks_of(a_planes, b_planes, tokens, heads, run, a_token, a_head, b_token, b_head), to_b,
                          a, b, first, planes);
          },
          nb::arg("a_planes"), nb::arg("b_planes"), nb::arg("tokens"), nb::arg("heads"), nb::arg("run"),
          nb::arg("a_token"), nb::arg("a_head"), nb::arg("b_token"), nb::arg("b_head"), nb::arg("to_b"),
          nb::arg("a_pages"), nb::arg("b_pages"), nb::arg("first"), nb::arg("planes"),
          "(from, to, bytes) of the copies that the copy engines are given.");
    hicache::gds::bind(m);
}
