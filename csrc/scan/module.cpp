// hicache_ext._native.read_headers: argument checks and the release of the GIL, nothing else.
#include "scan/module.hpp"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "scan/scan.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace hicache::scan {

namespace {

using Slots = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::bytes read_headers(int fd, std::uint64_t base, std::uint64_t slot_bytes, const Slots& slots, unsigned threads,
                       std::uint64_t cancelled) {
    if (threads == 0 || threads > 64) throw std::invalid_argument("threads 1..64");
    if (slots.shape(0) > 65536) throw std::invalid_argument("at most 65,536 slots in one call");
    std::vector<Found> found;
    {
        Released release;
        found = headers(fd, base, slot_bytes, {slots.data(), slots.shape(0)}, threads,
                        reinterpret_cast<const std::uint8_t*>(cancelled));
    }
    return nb::bytes(found.data(), found.size() * sizeof(Found));
}

}  // namespace

void bind(nb::module_& m) {
    m.def("read_headers", &read_headers, nb::arg("fd"), nb::arg("base"), nb::arg("slot_bytes"),
          nb::arg("slots").noconvert(), nb::arg("threads"), nb::arg("cancelled") = 0,
          "Slots of these with a whole header, 104 bytes each; see storage_backends.local.headers.");
}

}  // namespace hicache::scan
