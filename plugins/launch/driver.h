// The CUDA driver, opened on first use, so that the library loads on machines without one.
//
// Types and entry points are declared here as far as they are used: building needs no CUDA headers. A test
// compares the declarations with the vendor's cuda.h where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightforcing::cuda {

using Result = int;
using Device = int;
using Address = unsigned long long;
struct ContextTag;
struct FunctionTag;
struct KernelTag;
struct LibraryTag;
struct StreamTag;
using Context = ContextTag*;
using Function = FunctionTag*;
using Kernel = KernelTag*;
using Library = LibraryTag*;
using Stream = StreamTag*;

constexpr Result kSuccess = 0;
constexpr int kMaxDynamicSharedMemory = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kComputeCapabilityMajor = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeCapabilityMinor = 76; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

/// Entry points of the driver, by the names that libcuda.so.1 exports them under.
struct Driver {
    Result (*getErrorName)(Result, const char**);
    Result (*getErrorString)(Result, const char**);
    Result (*init)(unsigned int);
    Result (*deviceGetAttribute)(int*, int, Device);
    Result (*ctxGetCurrent)(Context*);
    Result (*ctxGetDevice)(Device*);
    Result (*ctxPushCurrent)(Context);
    Result (*ctxPopCurrent)(Context*);
    Result (*libraryLoadData)(Library*, const void*, int*, void**, unsigned int, int*, void**, unsigned int);
    Result (*libraryUnload)(Library);
    Result (*libraryGetKernel)(Kernel*, Library, const char*);
    Result (*kernelGetFunction)(Function*, Kernel);
    Result (*kernelSetAttribute)(int, int, Kernel, Device);
    Result (*memAlloc)(Address*, std::size_t);
    Result (*memFree)(Address);
    Result (*memcpyHtoD)(Address, const void*, std::size_t);
    Result (*streamSynchronize)(Stream);
    Result (*launchKernel)(Function, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,
                           unsigned int, unsigned int, Stream, void**, void**);
    Result (*funcLoad)(Function); ///< null before CUDA 12.4, where kernelGetFunction loads
};

/// The driver. Throws LF_NO_DRIVER if there is none; asks again at the next call then.
const Driver& driver();

/// Throws LF_CUDA_FAILURE with the error's name unless `result` is success; `what` was attempted.
void check(Result result, const char* what);

/// The device of the context that is current in this thread. Throws if there is none.
Device currentDevice();

} // namespace lightforcing::cuda
