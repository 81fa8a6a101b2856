// Compiles only if plugins/launch/driver.h declares the driver as the vendor's cuda.h does.
#include <cuda.h>

#include <string_view>
#include <type_traits>

#include "driver.h"

namespace {

using lightforcing::cuda::Driver;

/// Passed alike: both pointers, or both integers or enumerations of one size.
template <typename Ours, typename Theirs>
constexpr bool alike = std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> && sizeof(Ours) == sizeof(Theirs);

template <typename... Ours, typename... Theirs>
constexpr bool same(lightforcing::cuda::Result (*)(Ours...), CUresult (*)(Theirs...)) {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
        return (alike<Ours, Theirs> && ...);
    }
    return false;
}

// NOLINTNEXTLINE: cuda.h gives entry points their versions by macro, so only a macro can see them.
#define EXPANDED(name) TEXT(name)
#define TEXT(name) #name
#define SAME(member, function, exported)                                                                     \
    static_assert(same(decltype(Driver::member){}, decltype(&function){}), #member);                         \
    static_assert(std::string_view(EXPANDED(function)) == exported, #member)

SAME(getErrorName, cuGetErrorName, "cuGetErrorName");
SAME(getErrorString, cuGetErrorString, "cuGetErrorString");
SAME(init, cuInit, "cuInit");
SAME(deviceGetAttribute, cuDeviceGetAttribute, "cuDeviceGetAttribute");
SAME(ctxGetCurrent, cuCtxGetCurrent, "cuCtxGetCurrent");
SAME(ctxGetDevice, cuCtxGetDevice, "cuCtxGetDevice");
SAME(ctxPushCurrent, cuCtxPushCurrent, "cuCtxPushCurrent_v2");
SAME(ctxPopCurrent, cuCtxPopCurrent, "cuCtxPopCurrent_v2");
SAME(libraryLoadData, cuLibraryLoadData, "cuLibraryLoadData");
SAME(libraryUnload, cuLibraryUnload, "cuLibraryUnload");
SAME(libraryGetKernel, cuLibraryGetKernel, "cuLibraryGetKernel");
SAME(kernelGetFunction, cuKernelGetFunction, "cuKernelGetFunction");
SAME(kernelSetAttribute, cuKernelSetAttribute, "cuKernelSetAttribute");
SAME(memAlloc, cuMemAlloc, "cuMemAlloc_v2");
SAME(memFree, cuMemFree, "cuMemFree_v2");
SAME(memcpyHtoD, cuMemcpyHtoD, "cuMemcpyHtoD_v2");
SAME(streamSynchronize, cuStreamSynchronize, "cuStreamSynchronize");
SAME(launchKernel, cuLaunchKernel, "cuLaunchKernel");
SAME(funcLoad, cuFuncLoad, "cuFuncLoad");

static_assert(lightforcing::cuda::kSuccess == CUDA_SUCCESS);
static_assert(lightforcing::cuda::kMaxDynamicSharedMemory == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(lightforcing::cuda::kComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(lightforcing::cuda::kComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);

} // namespace
