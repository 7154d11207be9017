#include "device.hpp"

#include <unistd.h>

#include <cstring>

#include "fatbin.hpp"
#include "shape.hpp"

namespace hicache::cuda {

Device::Device(int ordinal) : api(cuda::api()), ordinal(ordinal), process_(getpid()) {
    const auto need = [](Result result, const std::string& what) {
        if (result != kSuccess) throw Unavailable(what + ": " + name_of(result));
    };
    DeviceNumber number = 0;
    const std::string self = "CUDA device " + std::to_string(ordinal);
    need(api.device_get(&number, ordinal), self);
    char text[256] = {};
    need(api.device_name(text, sizeof text - 1, number), self);
    name = text;
    need(api.driver_version(&driver_version), self);
    need(api.device_attribute(&multiprocessors, kAttributeMultiprocessors, number), self);
    need(api.device_attribute(&major, kAttributeMajor, number), self);
    need(api.device_attribute(&minor, kAttributeMinor, number), self);
    need(api.device_attribute(&max_pitch, kAttributeMaxPitch, number), self);
    need(api.context_retain(&context_, number), "the context of " + self);
    try {
        Entered entered(*this);
        load_kernels();
    } catch (...) {
        api.context_release(number);
        throw;
    }
}

Device::~Device() {
    if (!ours()) return;
    if (api.context_push(context_) == kSuccess) {  // not so when the driver is shutting down
        if (copy_stream_ != nullptr) api.stream_destroy(copy_stream_);
        if (scratch_ != 0) api.free(scratch_);
        if (module_ != nullptr) api.module_unload(module_);
        Context popped;
        api.context_pop(&popped);
    }
    DeviceNumber number = 0;
    if (api.device_get(&number, ordinal) == kSuccess) api.context_release(number);
}

bool Device::ours() const { return getpid() == process_; }

Device::Entered::Entered(const Device& device) : api_(device.api) {
    if (!device.ours())
        throw Unavailable("this process was forked after CUDA was opened: start it with spawn to use CUDA in it");
    check(api_.context_push(device.context_), "entering the CUDA context");
    api_.exchange_capture_mode(&mode_);
}

Device::Entered::~Entered() {
    api_.exchange_capture_mode(&mode_);
    Context popped;
    api_.context_pop(&popped);
}

void Device::load_kernels() {
    if (fatbin() == nullptr) {
        no_kernels = "built without nvcc";
        return;
    }
    const auto fits = [this](Result result, const char* what) {
        if (result != kSuccess && no_kernels.empty()) no_kernels = std::string(what) + ": " + name_of(result);
        return result == kSuccess;
    };
    if (!fits(api.module_load(&module_, fatbin()), "the driver does not load our kernels")) return;
    static constexpr const char* kNames[] = {"copy_1", "copy_2", "copy_4", "copy_8", "copy_16"};
    for (int i = 0; i < 5; ++i) fits(api.module_function(&copies_[i], module_, kNames[i]), kNames[i]);
    fits(api.module_function(&checksum_, module_, "crc32c_chunks"), "crc32c_chunks");
}

Function Device::copy_kernel(std::uint32_t vector_bytes) const { return copies_[__builtin_ctz(vector_bytes)]; }

void Device::make_current() const {
    if (!ours()) throw Unavailable("this process was forked after CUDA was opened");
    check(api.context_push(context_), "entering the CUDA context");
}

const char* Device::kind_at(Address address, Address& range_end) const {
    range_end = 0;
    int type = 0;
    if (api.pointer_attribute(&type, kPointerMemoryType, address) != kSuccess) return "pageable";
    Address start = 0, on_device = 0;
    std::size_t size = 0;
    if (api.pointer_attribute(&start, kPointerRangeStart, address) == kSuccess &&
        api.pointer_attribute(&size, kPointerRangeSize, address) == kSuccess && start <= address)
        range_end = start + size;
    if (type == kMemoryDevice) return "device";
    if (type != kMemoryHost) return "pageable";
    // Memory that is pinned, but that the device sees elsewhere, is of no use to a kernel.
    if (api.pointer_attribute(&on_device, kPointerDevicePointer, address) != kSuccess || on_device != address)
        return "pageable";
    return "pinned";
}

const char* Device::memory_kind(Address address, std::size_t length) const {
    Entered entered(*this);
    Address range_end = 0;
    const char* first = kind_at(address, range_end);
    const Address end = address + length;
    for (Address at = address; at < end && std::strcmp(first, "pageable") != 0;) {
        const char* kind = kind_at(at, range_end);
        if (std::strcmp(kind, first) != 0) return "pageable";
        // Without ranges: its end, and every so often between. A pool is pinned as a whole.
        at = range_end > at ? range_end : at + 1 < end ? std::min(at + (Address{64} << 20), end - 1) : end;
    }
    return first;
}

bool Device::capturing(Stream stream) const {
    int status = kCaptureNone;
    const Result result = api.stream_capturing(stream, &status);
    if (result == 900 || result == 906) return true;  // the default stream, while another one is captured
    check(result, "asking a stream for its state");
    return status != kCaptureNone;
}

void Device::copy(Address to, Address from, std::size_t bytes, const char* what) {
    Entered entered(*this);
    std::lock_guard lock(copy_mutex_);
    if (copy_stream_ == nullptr) check(api.stream_create(&copy_stream_, kStreamNonBlocking), "creating a stream");
    check(api.copy_async(to, from, bytes, copy_stream_), what);
    check(api.stream_synchronize(copy_stream_), what);
}

void Device::crc32c(const std::uint64_t* addresses, const std::uint32_t* lengths, std::size_t count,
                    std::uint32_t* out, Stream stream, unsigned blocks) {
    if (count == 0) return;
    if (!no_kernels.empty()) throw Unavailable("no checksums on the device: " + no_kernels);
    Entered entered(*this);
    if (capturing(stream)) throw Unavailable("no checksums while a CUDA graph is captured");
    std::lock_guard lock(scratch_mutex_);
    const std::size_t need = count * 16;
    if (scratch_bytes_ < need) {
        if (scratch_ != 0) api.free(scratch_);
        scratch_ = 0;
        scratch_bytes_ = 0;
        if (api.allocate(&scratch_, need) != kSuccess)
            throw Unavailable("out of device memory for a list of " + std::to_string(count) + " checksums");
        scratch_bytes_ = need;
    }
    const Address on_lengths = scratch_ + count * 8, on_out = on_lengths + count * 4;
    check(api.copy_async(scratch_, reinterpret_cast<Address>(addresses), count * 8, stream), "checksums: the list");
    check(api.copy_async(on_lengths, reinterpret_cast<Address>(lengths), count * 4, stream), "checksums: the list");
    ChecksumArguments arguments{reinterpret_cast<const std::uint64_t*>(scratch_),
                                reinterpret_cast<const std::uint32_t*>(on_lengths),
                                reinterpret_cast<std::uint32_t*>(on_out), static_cast<std::uint32_t>(count)};
    void* parameters[] = {&arguments};
    const auto grid = static_cast<unsigned>(std::min<std::size_t>(blocks, count));
    check(api.launch(checksum_, grid, 1, 1, kChecksumThreads, 1, 1, 0, stream, parameters, nullptr), "checksums");
    check(api.copy_async(reinterpret_cast<Address>(out), on_out, count * 4, stream), "checksums: the values");
    check(api.stream_synchronize(stream), "checksums");
}

int current_ordinal() {
    DeviceNumber current = 0, number = 0;
    int devices = 0;
    const Api& a = api();
    if (a.context_device(&current) != kSuccess || a.device_count(&devices) != kSuccess) return -1;
    for (int ordinal = 0; ordinal < devices; ++ordinal)
        if (a.device_get(&number, ordinal) == kSuccess && number == current) return ordinal;
    return -1;
}

DeviceMemory::DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes) : device_(std::move(device)) {
    Device::Entered entered(*device_);
    const Result result = device_->api.allocate(&address, bytes);
    if (result == kOutOfMemory)
        throw Unavailable("out of device memory: " + std::to_string(bytes) + " bytes cannot be had");
    check(result, "allocating device memory");
}

DeviceMemory::~DeviceMemory() {
    if (!device_->ours() || address == 0) return;
    try {
        Device::Entered entered(*device_);
        device_->api.free(address);  // waits for what uses it
    } catch (const std::exception&) {  // the driver is shutting down, and the memory with it
    }
}

OwnStream::OwnStream(std::shared_ptr<Device> device) : device_(std::move(device)) {
    Device::Entered entered(*device_);
    check(device_->api.stream_create(&handle, kStreamNonBlocking), "creating a stream");
}

OwnStream::~OwnStream() {
    if (!device_->ours()) return;
    try {
        Device::Entered entered(*device_);
        device_->api.stream_destroy(handle);
    } catch (const std::exception&) {  // the driver is shutting down
    }
}

void OwnStream::synchronize() const {
    Device::Entered entered(*device_);
    check(device_->api.stream_synchronize(handle), "waiting for a stream");
}

Events::Events(std::shared_ptr<Device> device, std::size_t count) : device_(std::move(device)) {
    Device::Entered entered(*device_);
    events_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        Event event = nullptr;
        check(device_->api.event_create(&event, kEventWithoutTiming), "creating an event");
        events_.push_back(event);
    }
}

Events::~Events() {
    if (!device_->ours()) return;
    for (Event event : events_) device_->api.event_destroy(event);
}

Event Events::at(std::size_t index) const {
    if (index >= events_.size()) throw std::out_of_range("there are " + std::to_string(events_.size()) + " events");
    if (index >= recorded_)
        throw Failed("layer " + std::to_string(index) + " has not been issued: there is nothing to wait for");
    return events_[index];
}

void Events::record(std::size_t index, Stream stream) {
    check(device_->api.event_record(events_.at(index), stream), "recording the end of a layer");
    recorded_ = index + 1;
}

void Events::wait(Stream stream, std::size_t index) const {
    Device::Entered entered(*device_);
    check(device_->api.stream_wait(stream, at(index), 0), "waiting for a layer");
}

bool Events::done(std::size_t index) const {
    Device::Entered entered(*device_);
    const Result result = device_->api.event_query(at(index));
    if (result != kNotReady) check(result, "asking for a layer");
    return result == kSuccess;
}

void Events::synchronize(std::size_t index) const {
    Device::Entered entered(*device_);
    check(device_->api.event_synchronize(at(index)), "waiting for a layer");
}

}  // namespace hicache::cuda
