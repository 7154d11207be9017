// hicache_ext._native.{seal,judge,write,read}_slots: argument checks and the release of the GIL, nothing else.
//
// Memory comes in as addresses; whoever calls keeps it alive until the call returns.
#include "slots/module.hpp"

#include <nanobind/ndarray.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "slots/run.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace hicache::slots {
namespace {

using U64s = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void wrong(const char* what) { throw std::invalid_argument(what); }

std::uint8_t* at(std::uint64_t address) { return reinterpret_cast<std::uint8_t*>(address); }

Run run_of(std::uint64_t headers, std::uint64_t stride, std::uint64_t header_bytes, const U64s& lengths, const U64s& addresses) {
    Run run;
    run.headers = at(headers);
    run.stride = stride;
    if (stride < header_bytes) wrong("headers overlap");
    run.shape.header_bytes = header_bytes;
    run.shape.lengths.assign(lengths.data(), lengths.data() + lengths.shape(0));
    if (!run.shape.fits()) wrong("a header of this size cannot hold the checksums of these lengths");
    if (lengths.shape(0) == 0 || addresses.shape(0) % lengths.shape(0) != 0) wrong("one address per buffer of each page");
    run.slot_bytes = header_bytes + run.shape.payload_bytes();
    run.payload.reserve(addresses.shape(0));
    for (std::size_t i = 0; i < addresses.shape(0); ++i) run.payload.push_back(at(addresses.data()[i]));
    return run;
}

/// What a reader asks for: copied out of Python's hands.
std::string keys_of(Run& run, const nb::bytes& name_space, const nb::bytes& keys, std::size_t verdicts) {
    if (name_space.size() != 16) wrong("a namespace has 16 bytes");
    if (keys.size() != 32 * run.pages() || verdicts != run.pages()) wrong("a key of 32 bytes and a verdict per page");
    std::memcpy(run.shape.name_space.data(), name_space.c_str(), 16);
    return {keys.c_str(), keys.size()};
}

void place(Run& run, int fd, std::uint64_t offset, std::uint64_t slot_bytes, std::uint64_t pad) {
    if (slot_bytes < run.slot_bytes) wrong("a slot of this size holds no page");
    if (pad == 0 && run.stride < slot_bytes) wrong("slots overlap in memory");
    run.fd = fd;
    run.offset = offset;
    run.slot_bytes = slot_bytes;
    run.pad = at(pad);
}

void seal_slots(std::uint64_t headers, std::uint64_t stride, std::uint64_t header_bytes, const U64s& lengths, const U64s& addresses) {
    const Run run = run_of(headers, stride, header_bytes, lengths, addresses);
    const Released release;
    seal(run);
}

void judge_slots(const nb::bytes& name_space, const nb::bytes& keys, std::uint64_t headers, std::uint64_t stride, std::uint64_t header_bytes,
                 const U64s& lengths, const U64s& addresses, const Out<std::uint8_t>& verdicts) {
    Run run = run_of(headers, stride, header_bytes, lengths, addresses);
    const std::string asked = keys_of(run, name_space, keys, verdicts.shape(0));
    std::uint8_t* out = verdicts.data();
    const Released release;
    judge(run, reinterpret_cast<const std::uint8_t*>(asked.data()), out);
}

nb::tuple write_slots(int fd, std::uint64_t offset, std::uint64_t slot_bytes, std::uint64_t headers,
                      std::uint64_t stride, std::uint64_t header_bytes, const U64s& lengths, const U64s& addresses, std::uint64_t pad) {
    Run run = run_of(headers, stride, header_bytes, lengths, addresses);
    place(run, fd, offset, slot_bytes, pad);
    Written written{};
    {
        const Released release;
        written = write(run);
    }
    return nb::make_tuple(written.pages, written.error);
}

void read_slots(int fd, std::uint64_t offset, std::uint64_t slot_bytes, const nb::bytes& name_space,
                const nb::bytes& keys, std::uint64_t headers, std::uint64_t stride, std::uint64_t header_bytes, const U64s& lengths,
                const U64s& addresses, std::uint64_t pad, const Out<std::uint8_t>& verdicts,
                const Out<std::int32_t>& errors) {
    Run run = run_of(headers, stride, header_bytes, lengths, addresses);
    const std::string asked = keys_of(run, name_space, keys, verdicts.shape(0));
    if (errors.shape(0) != run.pages()) wrong("an error per page");
    place(run, fd, offset, slot_bytes, pad);
    std::uint8_t* out = verdicts.data();
    std::int32_t* codes = errors.data();
    const Released release;
    read(run, reinterpret_cast<const std::uint8_t*>(asked.data()), out, codes);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("seal_slots", &seal_slots, nb::arg("headers"), nb::arg("stride"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(),
          nb::arg("addresses").noconvert(), "Checksums of pages into their headers, which lie one after the other.");
    m.def("judge_slots", &judge_slots, nb::arg("name_space"), nb::arg("keys"), nb::arg("headers"),
          nb::arg("stride"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(), nb::arg("addresses").noconvert(),
          nb::arg("verdicts").noconvert(), "A verdict (as of the I/O engine) for each page that lies in memory.");
    m.def("write_slots", &write_slots, nb::arg("fd"), nb::arg("offset"), nb::arg("slot_bytes"), nb::arg("headers"),
          nb::arg("stride"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(), nb::arg("addresses").noconvert(), nb::arg("pad"),
          "Seals pages and writes them into neighbouring slots: (whole pages in the file, errno or 0).");
    m.def("read_slots", &read_slots, nb::arg("fd"), nb::arg("offset"), nb::arg("slot_bytes"), nb::arg("name_space"),
          nb::arg("keys"), nb::arg("headers"), nb::arg("stride"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(),
          nb::arg("addresses").noconvert(), nb::arg("pad"), nb::arg("verdicts").noconvert(),
          nb::arg("errors").noconvert(), "Neighbouring slots into pages: of each a verdict, and an errno or 0.");
}

}  // namespace hicache::slots
