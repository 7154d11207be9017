#include "gds/cufile.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace hicache::gds {
namespace {

template <typename F>
void find(void* library, const char* symbol, F& into) {
    into = reinterpret_cast<F>(dlsym(library, symbol));
}

const char* resolve(void* library, Api& a) {
    const char* missing = nullptr;
    const auto need = [&](const char* symbol, auto& into) {
        find(library, symbol, into);
        if (into == nullptr && missing == nullptr) missing = symbol;
    };
    need("cuFileDriverOpen", a.driver_open);
    need("cuFileDriverGetProperties", a.driver_properties);
    need("cuFileHandleRegister", a.handle_register);
    need("cuFileHandleDeregister", a.handle_deregister);
    need("cuFileBufRegister", a.buffer_register);
    need("cuFileBufDeregister", a.buffer_deregister);
    need("cuFileRead", a.read);
    need("cuFileWrite", a.write);
    find(library, "cuFileGetVersion", a.version);
    find(library, "cuFileSetParameterBool", a.set_bool);
    find(library, "cuFileBatchIOSetUp", a.batch_setup);
    find(library, "cuFileBatchIOSubmit", a.batch_submit);
    find(library, "cuFileBatchIOGetStatus", a.batch_status);
    find(library, "cuFileBatchIOCancel", a.batch_cancel);
    find(library, "cuFileBatchIODestroy", a.batch_destroy);
    find(library, "cuFileReadAsync", a.read_async);
    find(library, "cuFileWriteAsync", a.write_async);
    return missing;
}

void need(const Error& error, const char* what) {
    if (error.code != 0) throw cuda::Unavailable(std::string(what) + ": " + words_of(error));
}

}  // namespace

std::string words_of(const Error& error) {
    const int code = error.code < 0 ? -error.code : error.code;
    if (code < kFirstCode) return std::strerror(code);
    std::string words = "cuFile error " + std::to_string(code);
    if (code == kCudaDriverError) words += " (" + cuda::name_of(error.cuda) + ")";
    return words;
}

Library::Library(std::shared_ptr<cuda::Device> of, const std::string& path, bool strict) : device(std::move(of)) {
    cuda::Device::Entered entered(*device);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw cuda::Unavailable(std::string("cuFile cannot be loaded: ") + dlerror());
    if (const char* symbol = resolve(library, api))
        throw cuda::Unavailable(path + " is too old: it has no " + symbol);
    if (api.version != nullptr) api.version(&version);
    if (strict) {
        if (api.set_bool == nullptr) throw cuda::Unavailable(path + " is too old to say whether it bypasses the CPU");
        need(api.set_bool(kParameterAllowCompatibility, false), "forbidding compatibility mode");
    }
    const Error opened = api.driver_open();
    if (opened.code != kAlreadyOpen) need(opened, "cuFile's driver does not open");
    need(api.driver_properties(&properties), "asking cuFile for its properties");
}

File::File(std::shared_ptr<Library> library, int fd) : library_(std::move(library)) {
    cuda::Device::Entered entered(*library_->device);
    fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd_ < 0) throw cuda::Unavailable(std::string("a file cannot be opened once more: ") + std::strerror(errno));
    Descriptor descriptor{};
    descriptor.type = kOpaqueFd;
    descriptor.fd = fd_;
    const Error error = library_->api.handle_register(&handle, &descriptor);
    if (error.code != 0) {
        close(fd_);
        throw cuda::Unavailable("cuFile does not take the file: " + words_of(error));
    }
}

File::~File() {
    if (!library_->device->ours()) return;
    try {
        cuda::Device::Entered entered(*library_->device);
        library_->api.handle_deregister(handle);
    } catch (const std::exception&) {  // the driver is shutting down
    }
    close(fd_);
}

Buffer::Buffer(std::shared_ptr<Library> library, cuda::Address at, std::size_t bytes)
    : address(at), length(bytes), library_(std::move(library)) {
    cuda::Device::Entered entered(*library_->device);
    need(library_->api.buffer_register(reinterpret_cast<const void*>(at), bytes, 0), "registering device memory");
}

Buffer::~Buffer() {
    if (!library_->device->ours()) return;
    try {
        cuda::Device::Entered entered(*library_->device);
        library_->api.buffer_deregister(reinterpret_cast<const void*>(address));
    } catch (const std::exception&) {  // the driver is shutting down
    }
}

}  // namespace hicache::gds
