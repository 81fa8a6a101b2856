// A little of the CUDA driver, opened at run time: the driver program starts on machines without one.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <cstddef>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gpu {

/// The entry point `name` of libcuda.so.1, of the type that cuda.h declares.
template <typename Function>
Function* find(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void* const symbol = library != nullptr ? dlsym(library, name) : nullptr;
    if (symbol == nullptr) {
        throw std::runtime_error(std::string("there is no NVIDIA driver with ") + name);
    }
    return reinterpret_cast<Function*>(symbol);
}

inline void check(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(result));
    }
}

/// The primary context of the first GPU, a stream, and a captured graph. Lives until the process ends.
/// Without a driver there is none of them, so that the plugin's own refusal can be seen.
class Device {
  public:
    Device() {
        if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) {
            return;
        }
        CUdevice device = 0;
        CUcontext context = nullptr;
        check(find<decltype(cuInit)>("cuInit")(0), "cuInit");
        check(find<decltype(cuDeviceGet)>("cuDeviceGet")(&device, 0), "cuDeviceGet");
        check(find<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain")(&context, device),
              "cuDevicePrimaryCtxRetain");
        check(find<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
        check(find<decltype(cuStreamCreate)>("cuStreamCreate")(&stream_, CU_STREAM_NON_BLOCKING),
              "cuStreamCreate");
    }

    CUstream stream() const { return stream_; }

    void synchronize() const {
        check(find<decltype(cuStreamSynchronize)>("cuStreamSynchronize")(stream_), "cuStreamSynchronize");
    }

    /// Captures what `work` enqueues, in the mode that engines are captured in.
    template <typename Work>
    void capture(Work&& work) {
        CUgraph graph = nullptr;
        check(find<decltype(cuStreamBeginCapture)>("cuStreamBeginCapture_v2")(
                  stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
              "cuStreamBeginCapture");
        work();
        check(find<decltype(cuStreamEndCapture)>("cuStreamEndCapture")(stream_, &graph),
              "cuStreamEndCapture");
        check(find<decltype(cuGraphInstantiateWithFlags)>("cuGraphInstantiateWithFlags")(&graph_, graph, 0),
              "cuGraphInstantiate");
    }

    void replay() const {
        check(find<decltype(cuGraphLaunch)>("cuGraphLaunch")(graph_, stream_), "cuGraphLaunch");
    }

  private:
    CUstream stream_ = nullptr;
    CUgraphExec graph_ = nullptr;
};

/// Device memory, at first all ones: NaN in every floating-point type.
class Buffer {
  public:
    Buffer(const Device& device, std::size_t bytes) : device_(&device), bytes_(bytes) {
        if (bytes_ > 0) {
            check(find<decltype(cuMemAlloc)>("cuMemAlloc_v2")(&address_, bytes_), "cuMemAlloc");
            check(find<decltype(cuMemsetD8)>("cuMemsetD8_v2")(address_, 0xFF, bytes_), "cuMemsetD8");
        }
    }

    void* address() const { return reinterpret_cast<void*>(address_); }

    void read(const std::string& path) {
        std::vector<char> content(bytes_);
        std::ifstream file(path, std::ios::binary);
        if (!file.read(content.data(), static_cast<std::streamsize>(bytes_)) || file.get() != EOF) {
            throw std::runtime_error(path + " does not hold " + std::to_string(bytes_) + " bytes");
        }
        if (bytes_ > 0) {
            check(find<decltype(cuMemcpyHtoD)>("cuMemcpyHtoD_v2")(address_, content.data(), bytes_),
                  "cuMemcpyHtoD");
            check(find<decltype(cuCtxSynchronize)>("cuCtxSynchronize")(), "cuCtxSynchronize");
        }
    }

    void write(const std::string& path) const {
        std::vector<char> content(bytes_);
        device_->synchronize();
        check(find<decltype(cuMemcpyDtoH)>("cuMemcpyDtoH_v2")(content.data(), address_, bytes_),
              "cuMemcpyDtoH");
        std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(bytes_));
    }

  private:
    const Device* device_;
    std::size_t bytes_;
    CUdeviceptr address_ = 0;
};

} // namespace gpu
