#include "route.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "shape.hpp"

namespace hicache::cuda {
namespace {

// Runs shorter than this are one row of a two-dimensional copy where they come in equal steps.
constexpr std::size_t kRowBytes = 16 << 10;
// Copies of a batch. Measured on an H100 (driver 580), runs of 64 KiB: 51 GB/s in batches of 128, 31 in batches of 4,096.
constexpr std::size_t kBatch = 128;
constexpr std::size_t kLeastChunk = 1 << 20;

std::uint64_t bits(const Side& side) {
    std::uint64_t all = static_cast<std::uint64_t>(side.token) | static_cast<std::uint64_t>(side.head);
    for (const Address plane : side.planes) all |= plane;
    return all;
}

std::size_t table_bytes(const Blocks& blocks) { return blocks.a.planes.size() * sizeof(Address); }

}  // namespace

std::vector<Run> Blocks::runs(bool to_b, std::size_t first, std::size_t planes, const std::uint64_t* a_pages,
                              const std::uint64_t* b_pages, std::size_t pages) const {
    std::vector<Run> found;
    for (std::size_t plane = first; plane < first + planes; ++plane)
        for (std::size_t page = 0; page < pages; ++page)
            for (std::int64_t token = 0; token < tokens; ++token)
                for (std::int64_t h = 0; h < heads; ++h) {
                    Address from = a.planes[plane] + a_pages[page] + token * a.token + h * a.head;
                    Address to = b.planes[plane] + b_pages[page] + token * b.token + h * b.head;
                    if (!to_b) std::swap(from, to);
                    if (!found.empty() && found.back().from + found.back().bytes == from &&
                        found.back().to + found.back().bytes == to)
                        found.back().bytes += run;
                    else
                        found.push_back({from, to, run});
                }
    return found;
}

Stage::Stage(std::shared_ptr<Device> device, std::size_t half)
    : half_bytes(half), device_(std::move(device)), memory_(device_, 2 * half) {
    Device::Entered entered(*device_);
    const Api& api = device_->api;
    check(api.stream_create(&stream, kStreamNonBlocking), "creating a stream");
    for (Event* event : {&begun, &filled[0], &filled[1], &emptied[0], &emptied[1]})
        check(api.event_create(event, kEventWithoutTiming), "creating an event");
}

Stage::~Stage() {
    if (!device_->ours()) return;
    const Api& api = device_->api;
    if (stream != nullptr) {
        api.stream_synchronize(stream);
        api.stream_destroy(stream);
    }
    for (Event event : {begun, filled[0], filled[1], emptied[0], emptied[1]})
        if (event != nullptr) api.event_destroy(event);
}

Route::Route(std::shared_ptr<Device> device, Blocks blocks, std::optional<Spans> spans)
    : device_(std::move(device)),
      blocks_(std::move(blocks)),
      spans_(std::move(spans)),
      tables_(device_, 3 * table_bytes(blocks_)),
      alignment_(bits(blocks_.a) | bits(blocks_.b) | blocks_.run) {
    const auto& planes = blocks_.b.planes;
    // Whatever is nearer on side b comes first, so that neighbouring threads write neighbouring bytes there.
    planes_inside_ = planes.size() > 1 && blocks_.tokens > 1 &&
                     planes[1] - planes[0] < static_cast<std::uint64_t>(std::abs(blocks_.b.token));
    if (!planes_inside_ && planes.size() > 2 && blocks_.tokens > 1)  // K and V lie apart, and layers close
        planes_inside_ = planes[2] - planes[0] < static_cast<std::uint64_t>(std::abs(blocks_.b.token));
    const std::size_t bytes = table_bytes(blocks_);
    const auto put = [&](std::size_t table, const std::vector<Address>& from) {
        device_->copy(tables_.address + table * bytes, reinterpret_cast<Address>(from.data()), bytes,
                      "putting a layout on the device");
    };
    put(0, blocks_.a.planes);
    put(1, blocks_.b.planes);
}

void issue(const Api& api, const std::vector<Run>& runs, Stream stream, bool batch) {
    const bool named = reinterpret_cast<std::uintptr_t>(stream) > 2;  // 0, 1 and 2 stand for default streams
    if (batch && named && api.copy_batch_async != nullptr && runs.size() > 1) {
        std::vector<Address> from(kBatch), to(kBatch);
        std::vector<std::size_t> bytes(kBatch);
        for (std::size_t done = 0; done < runs.size();) {
            const std::size_t count = std::min(kBatch, runs.size() - done);
            for (std::size_t i = 0; i < count; ++i) {
                from[i] = runs[done + i].from;
                to[i] = runs[done + i].to;
                bytes[i] = runs[done + i].bytes;
            }
            BatchAttributes attributes;
            std::size_t applies_from = 0, failed = 0;
            check(api.copy_batch_async(to.data(), from.data(), bytes.data(), count, &attributes, &applies_from, 1,
                                       &failed, stream),
                  "a batch of copies");
            done += count;
        }
        return;
    }
    for (const Run& run : runs) check(api.copy_async(run.to, run.from, run.bytes, stream), "a copy");
}

void Route::by_engine(const Pages& pages, Stream stream, bool batch) const {
    Device::Entered entered(*device_);
    const bool capturing = device_->capturing(stream);
    const Side& from = pages.to_b ? blocks_.a : blocks_.b;
    const Side& to = pages.to_b ? blocks_.b : blocks_.a;
    const auto run = static_cast<std::int64_t>(blocks_.run);
    const auto pitch = [&](std::int64_t stride) { return stride >= run && stride <= device_->max_pitch; };
    if (blocks_.tokens == 1 || blocks_.run >= kRowBytes || !pitch(from.token) || !pitch(to.token)) {
        issue(blocks_.runs(pages.to_b, pages.first, pages.planes, pages.a, pages.b, pages.count), stream,
              batch && !capturing);
        return;
    }
    Copy2d copy{};
    copy.src_type = copy.dst_type = kMemoryUnified;
    copy.src_pitch = static_cast<std::size_t>(from.token);
    copy.dst_pitch = static_cast<std::size_t>(to.token);
    copy.width = blocks_.run;
    copy.height = blocks_.tokens;
    for (std::size_t plane = pages.first; plane < pages.first + pages.planes; ++plane)
        for (std::size_t page = 0; page < pages.count; ++page)
            for (std::int64_t head = 0; head < blocks_.heads; ++head) {
                copy.src_device = from.planes[plane] + (pages.to_b ? pages.a : pages.b)[page] + head * from.head;
                copy.dst_device = to.planes[plane] + (pages.to_b ? pages.b : pages.a)[page] + head * to.head;
                check(device_->api.copy_2d_async(&copy, stream), "a two-dimensional copy");
            }
}

void Route::launch(const Side& from, const Side& to, Address from_planes, Address to_planes, std::size_t planes,
                   const std::uint64_t* from_pages, const std::uint64_t* to_pages, std::size_t pages,
                   bool planes_inside, std::uint64_t alignment, Stream stream, unsigned blocks) const {
    for (std::size_t page = 0; page < pages; ++page) alignment |= from_pages[page] | to_pages[page];
    const auto vector = static_cast<std::uint32_t>(std::min<std::uint64_t>(16, alignment & (~alignment + 1)));
    const std::uint64_t vectors = blocks_.run / vector;
    const auto lanes_log2 = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(5, std::bit_width(std::max<std::uint64_t>(vectors, 1) - 1)));
    const std::uint64_t chunks = (vectors + (1u << lanes_log2) - 1) >> lanes_log2;
    const std::uint64_t of_page = chunks * blocks_.heads * blocks_.tokens * planes;
    constexpr std::uint64_t kMost = (std::uint64_t{1} << 31) - 1;
    if (vectors > kMost || of_page > kMost) throw Unavailable("a page is too large for the kernel");
    CopyArguments a{};
    a.from_planes = reinterpret_cast<const std::uint64_t*>(from_planes);
    a.to_planes = reinterpret_cast<const std::uint64_t*>(to_planes);
    a.from_token = from.token;
    a.to_token = to.token;
    a.from_head = from.head;
    a.to_head = to.head;
    a.chunks = Divider::of(static_cast<std::uint32_t>(chunks));
    a.heads = Divider::of(blocks_.heads);
    a.second = Divider::of(planes_inside ? static_cast<std::uint32_t>(planes) : blocks_.tokens);
    a.third = Divider::of(planes_inside ? blocks_.tokens : static_cast<std::uint32_t>(planes));
    a.vectors = static_cast<std::uint32_t>(vectors);
    a.lanes_log2 = lanes_log2;
    a.planes_inside = planes_inside ? 1 : 0;
    const std::size_t most = std::min<std::uint64_t>(kPagesPerLaunch, kMost / of_page);
    for (std::size_t done = 0; done < pages;) {
        const std::size_t count = std::min(most, pages - done);
        std::copy_n(from_pages + done, count, a.from_pages);
        std::copy_n(to_pages + done, count, a.to_pages);
        a.total = static_cast<std::uint32_t>(count * of_page);
        const std::uint64_t useful = ((std::uint64_t{a.total} << lanes_log2) + kThreads - 1) / kThreads;
        const auto grid = static_cast<unsigned>(std::clamp<std::uint64_t>(useful, 1, std::max(1u, blocks)));
        void* parameters[] = {&a};
        check(device_->api.launch(device_->copy_kernel(vector), grid, 1, 1, kThreads, 1, 1, 0, stream, parameters,
                                  nullptr),
              "the copy kernel");
        done += count;
    }
}

void Route::by_kernel(const Pages& pages, Stream stream, unsigned blocks) const {
    if (!device_->no_kernels.empty()) throw Unavailable("no copy kernel: " + device_->no_kernels);
    Device::Entered entered(*device_);
    const std::size_t bytes = table_bytes(blocks_), skip = pages.first * sizeof(Address);
    const Address a = tables_.address + skip, b = a + bytes;
    if (pages.to_b)
        launch(blocks_.a, blocks_.b, a, b, pages.planes, pages.a, pages.b, pages.count, planes_inside_, alignment_,
               stream, blocks);
    else
        launch(blocks_.b, blocks_.a, b, a, pages.planes, pages.b, pages.a, pages.count, planes_inside_, alignment_,
               stream, blocks);
}

void Route::by_stage(const Pages& pages, Stream stream, unsigned blocks, Stage& stage) const {
    if (!device_->no_kernels.empty()) throw Unavailable("no copy kernel: " + device_->no_kernels);
    if (!spans_) throw Unavailable("a page's bytes lie scattered there: a stage would save nothing");
    if (pages.planes != blocks_.a.planes.size()) throw Unavailable("a stage takes all layers at once");
    Device::Entered entered(*device_);
    if (device_->capturing(stream)) throw Unavailable("a stage cannot be used while a CUDA graph is captured");
    const std::size_t spans = spans_->starts.size(), span = spans_->span_bytes;
    // Each stretch has a region of its own in a half, so that neighbouring pages stay neighbours.
    const std::size_t region = stage.half_bytes / spans / 16 * 16, most = region / span;
    if (most == 0) throw Unavailable("the stage is smaller than a page");
    const Api& api = device_->api;
    const Address stage_planes = tables_.address + 2 * table_bytes(blocks_);
    std::lock_guard lock(stage.mutex);
    {
        std::lock_guard planes_lock(stage_planes_mutex_);
        if (stage_planes_for_ != region) {
            std::vector<Address> planes(blocks_.a.planes.size());
            for (std::size_t p = 0; p < planes.size(); ++p) planes[p] = spans_->span_of[p] * region + spans_->at[p];
            device_->copy(stage_planes, reinterpret_cast<Address>(planes.data()), table_bytes(blocks_),
                          "putting a layout on the device");
            stage_planes_for_ = region;
        }
    }
    std::uint64_t alignment = bits(blocks_.a) | blocks_.run | static_cast<std::uint64_t>(blocks_.b.token) |
                              static_cast<std::uint64_t>(blocks_.b.head) | region;
    for (const std::uint64_t at : spans_->at) alignment |= at;
    // Pieces small enough that the kernel's first and last are a small part of the whole, large enough for the engine.
    const std::size_t least = (kLeastChunk + spans * span - 1) / (spans * span);
    const std::size_t piece = std::clamp<std::size_t>((pages.count + 31) / 32, std::min(least, most), most);
    std::vector<std::uint64_t> staged(piece);
    std::vector<Run> runs;
    if (!pages.to_b) {
        check(api.event_record(stage.begun, stream), "recording an event");
        check(api.stream_wait(stage.stream, stage.begun, 0), "waiting for an event");
    }
    std::size_t which = 0;
    for (std::size_t done = 0; done < pages.count; which ^= 1) {
        const std::size_t count = std::min(piece, pages.count - done);
        const Address half = stage.half(which);
        for (std::size_t i = 0; i < count; ++i) staged[i] = half + i * span;
        runs.clear();
        for (std::size_t s = 0; s < spans; ++s)
            for (std::size_t i = 0; i < count; ++i) {
                Address from = half + s * region + i * span, to = spans_->starts[s] + pages.b[done + i];
                if (!pages.to_b) std::swap(from, to);
                if (!runs.empty() && runs.back().from + runs.back().bytes == from &&
                    runs.back().to + runs.back().bytes == to)
                    runs.back().bytes += span;
                else
                    runs.push_back({from, to, span});
            }
        if (pages.to_b) {
            check(api.stream_wait(stream, stage.emptied[which], 0), "waiting for the stage");
            launch(blocks_.a, blocks_.b, tables_.address, stage_planes, pages.planes, pages.a + done, staged.data(),
                   count, planes_inside_, alignment, stream, blocks);
            check(api.event_record(stage.filled[which], stream), "recording an event");
            check(api.stream_wait(stage.stream, stage.filled[which], 0), "waiting for the stage");
            issue(runs, stage.stream, true);
            check(api.event_record(stage.emptied[which], stage.stream), "recording an event");
        } else {
            check(api.stream_wait(stage.stream, stage.emptied[which], 0), "waiting for the stage");
            issue(runs, stage.stream, true);
            check(api.event_record(stage.filled[which], stage.stream), "recording an event");
            check(api.stream_wait(stream, stage.filled[which], 0), "waiting for the stage");
            launch(blocks_.b, blocks_.a, stage_planes, tables_.address, pages.planes, staged.data(), pages.a + done,
                   count, planes_inside_, alignment, stream, blocks);
            check(api.event_record(stage.emptied[which], stream), "recording an event");
        }
        done += count;
    }
    if (pages.to_b) check(api.stream_wait(stream, stage.emptied[which ^ 1], 0), "waiting for the stage");
}

void settle(const Device& device, Stream stream, const Stage* stage) {
    try {
        Device::Entered entered(device);
        if (stage != nullptr) device.api.stream_synchronize(stage->stream);
        device.api.stream_synchronize(stream);  // in error: nothing runs there any more
    } catch (const std::exception&) {
    }
}

}  // namespace hicache::cuda
