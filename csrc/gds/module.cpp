// Argument checks and the release of the GIL, nothing else.
#include "gds/module.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>

#include "gds/lane.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace hicache::gds {
namespace {

using U64In = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U32In = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U32Out = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using I64Out = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void issue(Lane& lane, int way, bool write, const std::vector<std::shared_ptr<File>>& files, const U32In& which,
           const U64In& bases, const U64In& addresses, const U64In& lengths, const U64In& offsets) {
    const std::size_t count = addresses.shape(0);
    if (way < 0 || way > 2) throw std::invalid_argument("ways are 0 (calls), 1 (batch) and 2 (stream)");
    if (which.shape(0) != count || bases.shape(0) != count || lengths.shape(0) != count || offsets.shape(0) != count)
        throw std::invalid_argument("which, bases, addresses, lengths and offsets differ in size");
    std::vector<Piece> pieces(count);
    for (std::size_t i = 0; i < count; ++i) {
        if (which.data()[i] >= files.size()) throw std::out_of_range("there are fewer files");
        if (bases.data()[i] > addresses.data()[i]) throw std::invalid_argument("memory begins behind its own address");
        pieces[i] = Piece{files[which.data()[i]]->handle, bases.data()[i],
                          static_cast<off_t>(addresses.data()[i] - bases.data()[i]), lengths.data()[i],
                          static_cast<off_t>(offsets.data()[i])};
    }
    Released release;
    lane.issue(static_cast<Way>(way), write, std::move(pieces));
}

void results(Lane& lane, const I64Out& out) {
    const std::vector<std::int64_t>* found = nullptr;
    {
        Released release;
        found = &lane.results();
    }
    if (found->size() != out.shape(0)) throw std::invalid_argument("out is not as long as what was issued");
    std::copy(found->begin(), found->end(), out.data());
}

}  // namespace

void bind(nb::module_& m) {
    nb::class_<Library>(m, "CuFile", "A libcufile whose driver is open.")
        .def_prop_ro("version", [](const Library& l) { return l.version; }, "1000 * major + 10 * minor; 0: unknown.")
        .def_prop_ro("peer_to_peer", [](const Library& l) { return (l.properties.features & kFeaturePeerToPeer) != 0; })
        .def_prop_ro("nvidia_fs", [](const Library& l) {
            return nb::make_tuple(l.properties.driver_major, l.properties.driver_minor);
        });
    m.def("cufile",
          [](std::shared_ptr<cuda::Device> device, const std::string& path, bool strict) {
              return std::make_shared<Library>(std::move(device), path, strict);
          },
          nb::arg("device"), nb::arg("path"), nb::arg("strict"), nb::call_guard<Released>(),
          "Loads it and opens its driver. Unavailable: it cannot be had.");

    nb::class_<File>(m, "CuFileFile", "An open file that cuFile knows.");
    m.def("cufile_file", [](std::shared_ptr<Library> l, int fd) { return std::make_shared<File>(std::move(l), fd); },
          nb::arg("library"), nb::arg("fd"), nb::call_guard<Released>());

    nb::class_<Buffer>(m, "CuFileBuffer", "Device memory that cuFile knows.")
        .def_ro("address", &Buffer::address)
        .def_ro("length", &Buffer::length);
    m.def("cufile_buffer",
          [](std::shared_ptr<Library> l, std::uint64_t address, std::size_t length) {
              return std::make_shared<Buffer>(std::move(l), address, length);
          },
          nb::arg("library"), nb::arg("address"), nb::arg("length"), nb::call_guard<Released>());

    nb::class_<Lane>(m, "CuFileLane", "Moves pieces of files, one caller at a time.")
        .def("issue", &issue, nb::arg("way"), nb::arg("write"), nb::arg("files"), nb::arg("which"), nb::arg("bases"),
             nb::arg("addresses"), nb::arg("lengths"), nb::arg("offsets"))
        .def("results", &results, nb::arg("out").noconvert())
        .def("crc32c",
             [](Lane& lane, const U64In& addresses, const U32In& lengths, const U32Out& out, unsigned blocks) {
                 const std::size_t count = addresses.shape(0);
                 if (lengths.shape(0) != count || out.shape(0) != count)
                     throw std::invalid_argument("addresses, lengths and out differ in size");
                 if (count >= std::size_t{1} << 31 || blocks == 0) throw std::invalid_argument("too many chunks");
                 Released release;
                 lane.crc32c(addresses.data(), lengths.data(), count, out.data(), blocks);
             },
             nb::arg("addresses"), nb::arg("lengths"), nb::arg("out").noconvert(), nb::arg("blocks"));
    m.def("cufile_lane", [](std::shared_ptr<Library> l) { return std::make_shared<Lane>(std::move(l)); },
          nb::arg("library"), nb::call_guard<Released>());
}

}  // namespace hicache::gds
