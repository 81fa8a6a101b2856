// TensorRT's library, which is not linked.
#pragma once

#include <dlfcn.h>

#include <string>

#include <NvInferRuntime.h>

namespace lightforcing::tensorrt {

/// libnvinfer of the release that this was compiled for, if it is in the process; null otherwise. With `load`
/// it is also loaded from where the dynamic linker finds it.
inline void* openTensorRT(bool load) {
    const std::string library = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    return dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL | (load ? 0 : RTLD_NOLOAD));
}

} // namespace lightforcing::tensorrt
