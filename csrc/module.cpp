// The Python module hicache_ext._native: argument checks and the release of the GIL, nothing else.
// The index, the region of shared memory, the header scan and runs of slots have their own module.cpp.
//
// Memory comes in as addresses and lengths, so that one build serves every torch and numpy version;
// whoever calls keeps the memory alive until the call returns.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "checksum/crc32c.hpp"
#include "index/module.hpp"
#include "memory/module.hpp"
#include "released.hpp"
#include "scan/module.hpp"
#include "slots/module.hpp"

namespace nb = nanobind;

namespace {

using hicache::Released;
using hicache::checksum::Crc32cFn;

using U64In = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U32Out = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const std::uint8_t* at(std::uint64_t address) { return reinterpret_cast<const std::uint8_t*>(address); }

std::uint32_t crc32c(std::uint64_t address, std::uint64_t length, std::uint32_t seed) {
    Released release;
    return hicache::checksum::active().function(at(address), length, seed);
}

std::uint32_t crc32c_with(const std::string& name, std::uint64_t address, std::uint64_t length, std::uint32_t seed) {
    for (const auto& candidate : hicache::checksum::implementations())
        if (name == candidate.name) {
            Released release;
            return candidate.function(at(address), length, seed);
        }
    throw std::invalid_argument("no such CRC32C implementation on this CPU: " + name);
}

std::size_t crc32c_chunks(const U64In& addresses, const U64In& lengths, std::uint64_t chunk, const U32Out& out) {
    const std::size_t buffers = addresses.shape(0);
    if (lengths.shape(0) != buffers) throw std::invalid_argument("addresses and lengths differ in size");
    if (chunk == 0) throw std::invalid_argument("chunk must be at least 1 byte");
    const std::uint64_t* address = addresses.data();
    const std::uint64_t* length = lengths.data();
    std::uint32_t* result = out.data();

    // Counted before anything is written: a short `out` must not be overrun nor half filled. By
    // remaining room, since a sum of absurd lengths could wrap.
    std::size_t room = out.shape(0);
    for (std::size_t i = 0; i < buffers; ++i) {
        const std::uint64_t needed = length[i] / chunk + (length[i] % chunk != 0 ? 1 : 0);
        if (needed > room) throw std::invalid_argument("out is too small for one checksum per chunk");
        room -= needed;
    }

    Released release;
    const Crc32cFn function = hicache::checksum::active().function;
    std::size_t written = 0;
    for (std::size_t i = 0; i < buffers; ++i) {
        const std::uint8_t* data = at(address[i]);
        for (std::uint64_t left = length[i]; left != 0;) {
            const std::uint64_t take = left < chunk ? left : chunk;
            result[written++] = function(data, take, 0);
            data += take;
            left -= take;
        }
    }
    return written;
}

void memcpy_many(const U64In& destinations, const U64In& sources, const U64In& lengths) {
    const std::size_t count = lengths.shape(0);
    if (destinations.shape(0) != count || sources.shape(0) != count)
        throw std::invalid_argument("dst, src and lengths differ in size");
    const std::uint64_t* destination = destinations.data();
    const std::uint64_t* source = sources.data();
    const std::uint64_t* length = lengths.data();
    Released release;
    for (std::size_t i = 0; i < count; ++i)
        std::memcpy(reinterpret_cast<void*>(destination[i]), at(source[i]), length[i]);
}

nb::dict native_info() {
    nb::list available;
    for (const auto& candidate : hicache::checksum::implementations()) available.append(candidate.name);
    nb::dict info;
    info["crc32c"] = hicache::checksum::active().name;
    info["crc32c_available"] = available;
    info["compiler"] = HICACHE_COMPILER;
    info["io_engine"] = HICACHE_IO_ENGINE != 0;  // hicache_ext._io is part of this build
    return info;
}

}  // namespace

NB_MODULE(_native, m) {
    // noconvert: a silent copy of `out` would lose the result, of an address array hide a wrong dtype.
    m.def("crc32c", &crc32c, nb::arg("address"), nb::arg("length"), nb::arg("seed") = 0,
          "CRC32C of `length` bytes at `address`; `seed` is the CRC of what came before. Releases the GIL.");
    m.def("crc32c_with", &crc32c_with, nb::arg("implementation"), nb::arg("address"), nb::arg("length"),
          nb::arg("seed") = 0, "crc32c() by one named implementation of native_info()['crc32c_available'].");
    m.def("crc32c_chunks", &crc32c_chunks, nb::arg("addresses").noconvert(), nb::arg("lengths").noconvert(),
          nb::arg("chunk"), nb::arg("out").noconvert(),
          "One CRC32C per `chunk` bytes, starting anew at each buffer; returns how many were written to `out`.");
    m.def("memcpy_many", &memcpy_many, nb::arg("dst").noconvert(), nb::arg("src").noconvert(),
          nb::arg("lengths").noconvert(), "Copies each source to its destination; they must not overlap.");
    hicache::index::bind(m);
    hicache::memory::bind(m);
    hicache::scan::bind(m);
    hicache::slots::bind(m);
    m.def("native_info", &native_info, "What this build holds and what this CPU runs.");
}
