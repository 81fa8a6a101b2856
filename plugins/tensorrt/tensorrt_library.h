// TensorRT's library, where it is in this process already; it is never loaded from here.
#pragma once

#include <dlfcn.h>

#include <string>

#include <NvInferRuntime.h>

namespace lightforcing::tensorrt {

/// The entry point `name` of libnvinfer, of the release that this was compiled for; null if it is not loaded.
template <typename Function>
Function findInTensorRT(const char* name) {
    const std::string library = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) {
        return nullptr;
    }
    const auto function = reinterpret_cast<Function>(dlsym(handle, name));
    dlclose(handle); // gives the reference back; whoever loaded the library keeps it
    return function;
}

} // namespace lightforcing::tensorrt
