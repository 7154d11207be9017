// hicache_ext._native.Region: argument checks and the release of the GIL, nothing else.
//
// Memory comes in as addresses and lengths; whoever calls keeps a page's alive until the call returns. The region's own
// is kept here, so that no call can meet memory that is gone.
#include "memory/module.hpp"

#include <nanobind/ndarray.h>
#include <fcntl.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "memory/region.hpp"
#include "released.hpp"

namespace nb = nanobind;

namespace hicache::memory {

namespace {

template <typename T, std::size_t Dimensions>
using In = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using U64s = In<std::uint64_t, 1>;
using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void wrong(const char* what) { throw std::invalid_argument(what); }

std::uint8_t* at(std::uint64_t address) { return reinterpret_cast<std::uint8_t*>(address); }

/// A descriptor of our own: the caller may close his.
class Descriptor {
  public:
    explicit Descriptor(int fd) : fd_(fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
        if (fd >= 0 && fd_ < 0) throw std::runtime_error("no file descriptor left");
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (fd_ >= 0) close(fd_);
    }
    int get() const { return fd_; }

  private:
    int fd_;
};

struct Held {
    Held(std::uint8_t* base, int memory_fd, int lock_fd, unsigned owner, nb::object keep)
        : memory(std::move(keep)), fd(memory_fd), locks(lock_fd), region(base, fd.get(), locks.get(), owner) {}

    nb::object memory;
    Descriptor fd, locks;
    Region region;
};

/// Keys of one namespace, copied out of Python's hands.
class Keys {
  public:
    Keys(const nb::bytes& name_space, const nb::bytes& keys) : packed_(keys.c_str(), keys.size()) {
        if (name_space.size() != 16) wrong("a namespace has 16 bytes");
        if (keys.size() % 32 != 0) wrong("a key has 32 bytes");
        std::memcpy(page_.data(), name_space.c_str(), 16);
    }

    std::size_t size() const { return packed_.size() / 32; }

    const Identity& page(std::size_t i) {
        std::memcpy(page_.data() + 16, packed_.data() + 32 * i, 32);
        return page_;
    }

  private:
    std::string packed_;
    Identity page_{};
};

io::SlotShape shape_of(const nb::bytes& name_space, std::uint64_t header_bytes, const U64s& lengths) {
    io::SlotShape shape;
    if (name_space.size() != shape.name_space.size()) wrong("a namespace has 16 bytes");
    std::memcpy(shape.name_space.data(), name_space.c_str(), shape.name_space.size());
    shape.header_bytes = header_bytes;
    shape.lengths.assign(lengths.data(), lengths.data() + lengths.shape(0));
    if (!shape.fits()) wrong("a header of this size cannot hold the checksums of these lengths");
    return shape;
}

void lookup(Held& held, const nb::bytes& name_space, const nb::bytes& keys, bool used, const Bytes& found) {
    Keys asked(name_space, keys);
    if (found.shape(0) != asked.size()) wrong("one byte per key");
    std::uint8_t* out = found.data();
    const Released release;
    for (std::size_t i = 0; i < asked.size(); ++i) out[i] = held.region.has(asked.page(i), used);
}

void read(Held& held, const nb::bytes& name_space, std::uint64_t header_bytes, const U64s& lengths,
          const nb::bytes& keys, const U64s& addresses, bool used, const Bytes& verdicts) {
    const io::SlotShape shape = shape_of(name_space, header_bytes, lengths);
    Keys asked(name_space, keys);
    const std::size_t buffers = shape.lengths.size();
    if (addresses.shape(0) != buffers * asked.size() || verdicts.shape(0) != asked.size())
        wrong("one address per buffer and one verdict per key");
    std::vector<std::uint8_t*> to(buffers);
    const std::uint64_t* address = addresses.data();
    std::uint8_t* out = verdicts.data();
    const Released release;
    for (std::size_t i = 0; i < asked.size(); ++i) {
        for (auto& buffer : to) buffer = at(*address++);
        out[i] = static_cast<std::uint8_t>(held.region.read(shape, asked.page(i), to, used));
    }
}

void write(Held& held, const nb::bytes& name_space, std::uint64_t header_bytes, const U64s& lengths,
           const nb::bytes& keys, const U64s& addresses, const In<std::uint8_t, 2>& headers, const Bytes& verdicts) {
    const io::SlotShape shape = shape_of(name_space, header_bytes, lengths);
    Keys asked(name_space, keys);
    const std::size_t buffers = shape.lengths.size();
    if (addresses.shape(0) != buffers * asked.size() || verdicts.shape(0) != asked.size() ||
        headers.shape(0) != asked.size() || headers.shape(1) != header_bytes)
        wrong("one address per buffer, one header and one verdict per key");
    std::vector<const std::uint8_t*> from(buffers);
    const std::uint64_t* address = addresses.data();
    const std::uint8_t* header = headers.data();
    std::uint8_t* out = verdicts.data();
    const Released release;
    for (std::size_t i = 0; i < asked.size(); ++i, header += header_bytes) {
        for (auto& buffer : from) buffer = at(*address++);
        out[i] = static_cast<std::uint8_t>(held.region.write(shape, asked.page(i), header, from));
    }
}

std::vector<Identity> all(Keys& asked) {
    std::vector<Identity> pages(asked.size());
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = asked.page(i);
    return pages;
}

const Mover& mover_of(const nb::capsule& mover) {
    const char* name = mover.name();
    if (name == nullptr || std::strcmp(name, kMoverName) != 0) wrong("another build's mover");
    return *static_cast<const Mover*>(mover.data());
}

std::span<Verdict> as_verdicts(const Bytes& verdicts) {
    return {reinterpret_cast<Verdict*>(verdicts.data()), verdicts.shape(0)};
}

std::string read_by(Held& held, const nb::capsule& mover, const nb::bytes& name_space, std::uint64_t header_bytes,
                    const U64s& lengths, const nb::bytes& keys, const U64s& addresses, bool used, const Bytes& verdicts) {
    const io::SlotShape shape = shape_of(name_space, header_bytes, lengths);
    Keys asked(name_space, keys);
    if (addresses.shape(0) != shape.lengths.size() * asked.size() || verdicts.shape(0) != asked.size())
        wrong("one address per buffer and one verdict per key");
    const Mover& by = mover_of(mover);
    const std::span<Verdict> out = as_verdicts(verdicts);
    const Released release;
    return held.region.read_by(by, shape, all(asked), addresses.data(), used, out);
}

std::string write_by(Held& held, const nb::capsule& mover, const nb::bytes& name_space, std::uint64_t header_bytes,
                     const U64s& lengths, const nb::bytes& keys, const U64s& addresses,
                     const In<std::uint8_t, 2>& headers, const Bytes& verdicts) {
    const io::SlotShape shape = shape_of(name_space, header_bytes, lengths);
    Keys asked(name_space, keys);
    if (addresses.shape(0) != shape.lengths.size() * asked.size() || verdicts.shape(0) != asked.size() ||
        headers.shape(0) != asked.size() || headers.shape(1) != header_bytes)
        wrong("one address per buffer, one header and one verdict per key");
    const Mover& by = mover_of(mover);
    const std::span<Verdict> out = as_verdicts(verdicts);
    const Released release;
    return held.region.write_by(by, shape, all(asked), headers.data(), addresses.data(), out);
}

void remove(Held& held, const nb::bytes& name_space, const nb::bytes& keys, const Bytes& found) {
    Keys asked(name_space, keys);
    if (found.shape(0) != asked.size()) wrong("one byte per key");
    std::uint8_t* out = found.data();
    const Released release;
    for (std::size_t i = 0; i < asked.size(); ++i) out[i] = held.region.remove(asked.page(i));
}

std::uint64_t clear(Held& held, const nb::bytes& name_space) {
    const Keys space(name_space, nb::bytes("", 0));
    const std::string copy(name_space.c_str(), 16);
    const Released release;
    return held.region.clear(reinterpret_cast<const std::uint8_t*>(copy.data()));
}

nb::bytes going(Held& held, std::size_t most) {
    std::vector<Identity> pages;
    {
        const Released release;
        pages = held.region.going(most);
    }
    return nb::bytes(pages.data(), pages.size() * sizeof(Identity));
}

nb::dict counts(const Held& held) {
    const Counts counts = held.region.counts();
    nb::dict told;
    told["pages"] = counts.pages;
    told["bytes"] = counts.bytes;
    told["extents"] = held.region.extents();
    told["free_extents"] = counts.free_extents;
    told["evicted"] = counts.evicted;
    told["kept"] = counts.kept;
    told["displaced"] = counts.displaced;
    told["changed"] = counts.changed;
    told["corrupt"] = counts.damaged;
    told["takeovers"] = counts.takeovers;
    return told;
}

Held* open(std::uint64_t address, std::uint64_t length, int memory_fd, int lock_fd, unsigned owner, nb::object memory) {
    if (const std::string problem = Region::problem(at(address), length); !problem.empty())
        throw std::invalid_argument(problem);
    if (owner == 0 || owner >= kMostOwners) wrong("owner is out of range");
    return new Held(at(address), memory_fd, lock_fd, owner, std::move(memory));
}

}  // namespace

void bind(nb::module_& m) {
    m.attr("REGION_OWNERS") = kMostOwners;
    m.def(
        "region_layout",
        [](std::uint64_t capacity) {
            const Geometry g = Geometry::of(capacity);
            return nb::make_tuple(g.extents, g.extent_bytes, g.data_at, g.file_bytes);
        },
        nb::arg("capacity"), "(extents, bytes of each, where the first begins, bytes of the whole); 0 extents: no such.");
    m.def(
        "region_format",
        [](std::uint64_t address, std::uint64_t capacity) { Region::format(at(address), Geometry::of(capacity)); },
        nb::arg("address"), nb::arg("capacity"), "Lays an empty region into zeroed memory.");
    m.def(
        "region_problem",
        [](std::uint64_t address, std::uint64_t length) { return Region::problem(at(address), length); },
        nb::arg("address"), nb::arg("length"), "Why this memory is no region of this version; empty when it is one.");
    nb::class_<Held>(m, "Region")
        .def(nb::new_(&open), nb::arg("address"), nb::arg("length"), nb::arg("memory_fd"), nb::arg("lock_fd"),
             nb::arg("owner"), nb::arg("memory"))
        .def("lookup", &lookup, nb::arg("namespace"), nb::arg("keys"), nb::arg("used"), nb::arg("found").noconvert())
        .def("read", &read, nb::arg("namespace"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(),
             nb::arg("keys"), nb::arg("addresses").noconvert(), nb::arg("used"), nb::arg("verdicts").noconvert())
        .def("write", &write, nb::arg("namespace"), nb::arg("header_bytes"), nb::arg("lengths").noconvert(),
             nb::arg("keys"), nb::arg("addresses").noconvert(), nb::arg("headers").noconvert(),
             nb::arg("verdicts").noconvert())
        .def("read_by", &read_by, nb::arg("mover"), nb::arg("namespace"), nb::arg("header_bytes"),
             nb::arg("lengths").noconvert(), nb::arg("keys"), nb::arg("addresses").noconvert(), nb::arg("used"),
             nb::arg("verdicts").noconvert(), "As read, by a mover: why it could not; empty when it could.")
        .def("write_by", &write_by, nb::arg("mover"), nb::arg("namespace"), nb::arg("header_bytes"),
             nb::arg("lengths").noconvert(), nb::arg("keys"), nb::arg("addresses").noconvert(),
             nb::arg("headers").noconvert(), nb::arg("verdicts").noconvert(),
             "As write, by a mover: why it could not; empty when it could.")
        .def("remove", &remove, nb::arg("namespace"), nb::arg("keys"), nb::arg("found").noconvert())
        .def("clear", &clear, nb::arg("namespace"))
        .def("going", &going, nb::arg("most"), "48 bytes a page: namespace and key.")
        .def("changes", [](const Held& held) { return held.region.changes(); })
        .def("counts", &counts)
        .def("prepare", [](Held& held, std::uint64_t ahead, std::uint64_t step) { return held.region.prepare(ahead, step); },
             nb::arg("ahead"), nb::arg("step"), nb::call_guard<Released>(),
             "Memory for what is opened next, a step of it; False: enough is there, or there is no more.")
        .def("take",
             [](Held& held, std::uint32_t extent) {
                 if (extent >= held.region.extents()) wrong("there are fewer extents");
                 return held.region.take(extent);
             },
             nb::arg("extent"), nb::call_guard<Released>(),
             "All memory of an extent; False: there is not enough. For any number of threads.")
        .def("opened", [](const Held& held) { return held.region.opened(); })
        .def_prop_ro("extents", [](const Held& held) { return held.region.extents(); })
        .def_prop_ro("capacity", [](const Held& held) { return held.region.extents() * held.region.extent_bytes(); })
        .def_prop_ro("largest_page", [](const Held& held) { return held.region.extent_bytes() - kUnit; })
        .def("retire", [](Held& held) { held.region.retire(); });
}

}  // namespace hicache::memory
