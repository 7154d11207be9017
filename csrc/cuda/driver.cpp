// Finding the driver and its functions.
#include "driver.hpp"

#include <dlfcn.h>
#include <unistd.h>

namespace hicache::cuda {
namespace {

struct Loaded {
    Api api{};
    pid_t process = getpid();
    std::string missing = "not loaded";
};

template <typename F>
bool find(void* library, const char* symbol, F& into) {
    into = reinterpret_cast<F>(dlsym(library, symbol));
    return into != nullptr;
}

const char* resolve(void* library, Api& a) {
    const char* missing = nullptr;
    const auto need = [&](const char* symbol, auto& into) {
        if (!find(library, symbol, into) && missing == nullptr) missing = symbol;
    };
    need("cuInit", a.init);
    need("cuDriverGetVersion", a.driver_version);
    need("cuDeviceGetCount", a.device_count);
    need("cuDeviceGet", a.device_get);
    need("cuDeviceGetName", a.device_name);
    need("cuDeviceGetAttribute", a.device_attribute);
    need("cuDevicePrimaryCtxRetain", a.context_retain);
    need("cuDevicePrimaryCtxRelease_v2", a.context_release);
    need("cuCtxPushCurrent_v2", a.context_push);
    need("cuCtxPopCurrent_v2", a.context_pop);
    need("cuCtxGetDevice", a.context_device);
    need("cuGetErrorName", a.error_name);
    need("cuModuleLoadData", a.module_load);
    need("cuModuleUnload", a.module_unload);
    need("cuModuleGetFunction", a.module_function);
    need("cuLaunchKernel", a.launch);
    need("cuMemAlloc_v2", a.allocate);
    need("cuMemFree_v2", a.free);
    need("cuMemAllocHost_v2", a.allocate_host);
    need("cuMemFreeHost", a.free_host);
    need("cuMemcpyAsync", a.copy_async);
    need("cuMemcpy2DAsync_v2", a.copy_2d_async);
    need("cuPointerGetAttribute", a.pointer_attribute);
    need("cuStreamCreate", a.stream_create);
    need("cuStreamCreateWithPriority", a.stream_create_with_priority);
    need("cuStreamDestroy_v2", a.stream_destroy);
    need("cuStreamWaitEvent", a.stream_wait);
    need("cuStreamSynchronize", a.stream_synchronize);
    need("cuStreamIsCapturing", a.stream_capturing);
    need("cuThreadExchangeStreamCaptureMode", a.exchange_capture_mode);
    need("cuEventCreate", a.event_create);
    need("cuEventDestroy_v2", a.event_destroy);
    need("cuEventRecord", a.event_record);
    need("cuEventQuery", a.event_query);
    need("cuEventSynchronize", a.event_synchronize);
    find(library, "cuMemcpyBatchAsync", a.copy_batch_async);  // the first version of its name: 12.8's
    return missing;
}

Loaded load() {
    Loaded loaded;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        loaded.missing = "no CUDA driver: libcuda.so.1 cannot be loaded";
        return loaded;
    }
    if (const char* symbol = resolve(library, loaded.api)) {
        loaded.missing = std::string("the CUDA driver is too old: it has no ") + symbol;
        return loaded;
    }
    const auto call = [&](Result result, const char* what) {
        if (result == kSuccess) return true;
        const char* name = nullptr;
        loaded.api.error_name(result, &name);
        loaded.missing = std::string("the CUDA driver finds no usable device: ") + what + " answers " +
                         (name != nullptr ? name : std::to_string(result));
        return false;
    };
    int devices = 0;
    if (!call(loaded.api.init(0), "cuInit") || !call(loaded.api.device_count(&devices), "cuDeviceGetCount"))
        return loaded;
    loaded.missing = devices > 0 ? "" : "the CUDA driver finds no device";
    return loaded;
}

const Loaded& loaded() {
    static const Loaded once = load();
    return once;
}

}  // namespace

const Api& api() {
    if (loaded().process != getpid())
        throw Unavailable("this process was forked from one that had opened CUDA: start it with spawn to use CUDA in it");
    if (!loaded().missing.empty()) throw Unavailable(loaded().missing);
    return loaded().api;
}

std::string name_of(Result result) {
    const char* name = nullptr;
    if (loaded().api.error_name != nullptr) loaded().api.error_name(result, &name);
    return name != nullptr ? name : "CUDA error " + std::to_string(result);
}

}  // namespace hicache::cuda
