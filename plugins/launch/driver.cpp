// Opening libcuda.so.1 and turning its errors into ours.
#include "driver.h"

#include <dlfcn.h>

#include <string>

#include "error.h"

namespace lightforcing::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

std::string lastLoaderError() {
    const char* message = dlerror();
    return message != nullptr ? message : "no reason given";
}

template <typename Pointer>
void find(void* library, const char* name, Pointer& entry) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) {
        throw Error(LF_NO_DRIVER, std::string(kLibrary) + " has no " + name +
                                      "; the kernels need an NVIDIA driver of CUDA 12.0 or later");
    }
    entry = reinterpret_cast<Pointer>(symbol);
}

Driver open() {
    // Stays open: its code may be running in other threads when this library goes.
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw Error(LF_NO_DRIVER,
                    "the NVIDIA driver cannot be opened: " + lastLoaderError() +
                        "; launching kernels needs a machine with an NVIDIA GPU and its driver");
    }
    Driver driver{};
    find(library, "cuGetErrorName", driver.getErrorName);
    find(library, "cuGetErrorString", driver.getErrorString);
    find(library, "cuInit", driver.init);
    find(library, "cuDeviceGetAttribute", driver.deviceGetAttribute);
    find(library, "cuCtxGetCurrent", driver.ctxGetCurrent);
    find(library, "cuCtxGetDevice", driver.ctxGetDevice);
    find(library, "cuCtxPushCurrent_v2", driver.ctxPushCurrent);
    find(library, "cuCtxPopCurrent_v2", driver.ctxPopCurrent);
    find(library, "cuLibraryLoadData", driver.libraryLoadData);
    find(library, "cuLibraryUnload", driver.libraryUnload);
    find(library, "cuLibraryGetKernel", driver.libraryGetKernel);
    find(library, "cuKernelGetFunction", driver.kernelGetFunction);
    find(library, "cuKernelSetAttribute", driver.kernelSetAttribute);
    find(library, "cuMemAlloc_v2", driver.memAlloc);
    find(library, "cuMemFree_v2", driver.memFree);
    find(library, "cuMemcpyHtoD_v2", driver.memcpyHtoD);
    find(library, "cuStreamSynchronize", driver.streamSynchronize);
    find(library, "cuLaunchKernel", driver.launchKernel);
    driver.funcLoad = reinterpret_cast<decltype(driver.funcLoad)>(dlsym(library, "cuFuncLoad"));
    if (const Result result = driver.init(0); result != kSuccess) {
        const char* name = nullptr;
        driver.getErrorName(result, &name);
        throw Error(LF_NO_DRIVER, std::string("the NVIDIA driver does not start: ") +
                                      (name != nullptr ? name : "unknown error") +
                                      "; check that nvidia-smi lists a GPU");
    }
    return driver;
}

} // namespace

const Driver& driver() {
    static const Driver opened = open();
    return opened;
}

void check(Result result, const char* what) {
    if (result == kSuccess) {
        return;
    }
    const char* name = nullptr;
    const char* text = nullptr;
    driver().getErrorName(result, &name);
    driver().getErrorString(result, &text);
    throw Error(LF_CUDA_FAILURE, std::string("cannot ") + what + ": " +
                                     (name != nullptr ? name : "CUDA error " + std::to_string(result)) +
                                     (text != nullptr ? std::string(" (") + text + ")" : ""));
}

Device currentDevice() {
    Context context = nullptr;
    check(driver().ctxGetCurrent(&context), "read the current CUDA context");
    if (context == nullptr) {
        throw Error(LF_INVALID_ARGUMENT, "no CUDA context is current in this thread; select a device first "
                                         "(cudaSetDevice or cuCtxSetCurrent)");
    }
    Device device = 0;
    check(driver().ctxGetDevice(&device), "read the device of the current CUDA context");
    return device;
}

} // namespace lightforcing::cuda
