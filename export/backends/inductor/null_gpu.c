/* A GPU that does nothing, for a process that compiles for one: preloaded, it answers PyTorch in place of the CUDA
 * runtime, and is the driver's library that compiled packages are linked with.
 *
 * "Device memory" is host memory, copies are copies, launches do nothing, streams and events are always done. Which GPU
 * it is, NULL_GPU says in the environment: "major,minor,multiprocessors,shared memory per block,shared memory per
 * multiprocessor,L2 cache,memory,name", sizes in bytes. There are no results, so copies from the device to the host fail; only what compilers ask for is true.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct cudaDeviceProp gpu;

__attribute__((constructor)) static void describe(void)
{
    const char *given = getenv("NULL_GPU");
    unsigned long shared_block = 0, shared_sm = 0, cache = 0, memory = 0;
    if (!given || sscanf(given, "%d,%d,%d,%lu,%lu,%lu,%lu,%255[^\n]", &gpu.major, &gpu.minor, &gpu.multiProcessorCount,
                         &shared_block, &shared_sm, &cache, &memory, gpu.name) != 8) {
        fprintf(stderr, "NULL_GPU is %s; expected eight values\n", given ? given : "not set");
        abort();
    }
    gpu.sharedMemPerBlock = 48 << 10;
    gpu.sharedMemPerBlockOptin = shared_block;
    gpu.sharedMemPerMultiprocessor = shared_sm;
    gpu.l2CacheSize = (int)cache;
    gpu.totalGlobalMem = memory;
    gpu.warpSize = 32;
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiProcessor = 2048;
    gpu.maxBlocksPerMultiProcessor = 32;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { (void)device; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    (void)device;
    *found = gpu;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    (void)device;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = gpu.multiProcessorCount; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { (void)device; (void)peer; *can = 0; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = gpu.totalGlobalMem; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

/* ---- memory ---- */

cudaError_t cudaMalloc(void **memory, size_t size)
{
    return posix_memalign(memory, 512, size ? size : 512) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void *memory) { free(memory); return cudaSuccess; }
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) { (void)flags; return cudaMalloc(memory, size); }
cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    (void)stream;
    if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDefault)
        return cudaErrorNotSupported; /* nothing was computed: what looks at a result must fail */
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream)
{
    (void)stream;
    memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) { return cudaMemsetAsync(memory, value, size, NULL); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *memory)
{
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = (void *)memory;
    return cudaSuccess;
}

/* ---- kernels, streams, events ---- */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    (void)kernel; (void)grid; (void)block; (void)arguments; (void)shared; (void)stream;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments)
{
    (void)config; (void)kernel; (void)arguments;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value)
{
    (void)kernel; (void)attribute; (void)value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel)
{
    (void)kernel;
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared, unsigned flags)
{
    (void)kernel; (void)threads; (void)shared; (void)flags;
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    (void)flags; (void)priority;
    *stream = (cudaStream_t)16;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { (void)stream; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { (void)stream; (void)event; (void)flags; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { (void)stream; *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { (void)mode; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { (void)flags; *event = (cudaEvent_t)8; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { (void)event; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { (void)event; (void)stream; return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { (void)event; return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { (void)event; return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { (void)start; (void)end; *milliseconds = 1; return cudaSuccess; }

/* ---- the driver's names that a compiled package is linked with; none is ever called ---- */

#define DRIVER(name) int name(void) { return 100; /* CUDA_ERROR_NO_DEVICE */ }
DRIVER(cuInit)
DRIVER(cuDriverGetVersion)
DRIVER(cuGetErrorName)
DRIVER(cuGetErrorString)
DRIVER(cuGetProcAddress)
DRIVER(cuGetProcAddress_v2)
DRIVER(cuModuleLoad)
DRIVER(cuModuleLoadData)
DRIVER(cuModuleLoadDataEx)
DRIVER(cuModuleGetFunction)
DRIVER(cuModuleGetGlobal_v2)
DRIVER(cuModuleUnload)
DRIVER(cuFuncSetAttribute)
DRIVER(cuFuncGetAttribute)
DRIVER(cuFuncSetCacheConfig)
DRIVER(cuLaunchKernel)
DRIVER(cuLaunchKernelEx)
DRIVER(cuLaunchCooperativeKernel)
DRIVER(cuTensorMapEncodeTiled)
DRIVER(cuCtxGetCurrent)
DRIVER(cuMemcpyHtoD_v2)
DRIVER(cuMemcpyDtoH_v2)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0; *active = 1; return 0; }
