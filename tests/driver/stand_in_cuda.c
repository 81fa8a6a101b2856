/* Stands in for libcuda.so.1 where there is no GPU: writes down what it is asked, and computes nothing.
 *
 * Environment: STAND_IN_LOG, the file to append to; STAND_IN_CAPABILITY, such as 90; STAND_IN_FAIL, a
 * function that fails; STAND_IN_NO_CONTEXT, if set, no context is current. "Cubins" are texts that end in "
 * arguments N\n". */

#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, MOST_KERNELS = 64, MOST_ALLOCATIONS = 256 };

static struct kernel {
    char name[128];
    int arguments;
    int loaded;
} kernels[MOST_KERNELS];
static void* allocations[MOST_ALLOCATIONS];
static int context = 77;

/* Writes one line, and decides whether the call fails. */
#define CALLED(function, ...)                                                                                \
    do {                                                                                                     \
        FILE* const file = fopen(getenv("STAND_IN_LOG"), "a");                                               \
        const char* const failing = getenv("STAND_IN_FAIL");                                                 \
        fprintf(file, function " " __VA_ARGS__);                                                             \
        fputc('\n', file);                                                                                   \
        fclose(file);                                                                                        \
        if (failing != NULL && strcmp(failing, function) == 0) {                                             \
            return OUT_OF_MEMORY;                                                                            \
        }                                                                                                    \
    } while (0)

int cuGetErrorName(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return SUCCESS;
}

int cuGetErrorString(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : NULL;
    return SUCCESS;
}

int cuInit(unsigned int flags) {
    CALLED("cuInit", "%u", flags);
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const int capability = atoi(getenv("STAND_IN_CAPABILITY"));
    (void)device;
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return SUCCESS;
}

int cuCtxGetCurrent(void** current) {
    *current = getenv("STAND_IN_NO_CONTEXT") != NULL ? NULL : &context;
    return SUCCESS;
}

int cuCtxGetDevice(int* device) {
    *device = 3;
    return SUCCESS;
}

int cuCtxPushCurrent_v2(void* pushed) {
    CALLED("cuCtxPushCurrent", "%d", pushed == &context);
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void** popped) {
    CALLED("cuCtxPopCurrent", "");
    *popped = &context;
    return SUCCESS;
}

int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned int c, void* d, void* e,
                      unsigned int f) {
    const char* const text = (const char*)code + 4; /* after the magic number */
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    CALLED("cuLibraryLoadData", "%.*s", (int)(strstr(text, " arguments") - text), text);
    for (int index = 0; index < MOST_KERNELS; ++index) {
        struct kernel* const kernel = &kernels[index];
        if (!kernel->loaded) {
            sscanf(text, "%127s", kernel->name);
            kernel->arguments = atoi(strstr(text, " arguments") + 10);
            kernel->loaded = 1;
            *library = kernel;
            return SUCCESS;
        }
    }
    return OUT_OF_MEMORY;
}

int cuLibraryUnload(struct kernel* library) {
    CALLED("cuLibraryUnload", "%s", library->name);
    library->loaded = 0;
    return SUCCESS;
}

int cuLibraryGetKernel(void** kernel, struct kernel* library, const char* entry) {
    CALLED("cuLibraryGetKernel", "%s %s", library->name, entry);
    *kernel = library;
    return SUCCESS;
}

int cuKernelGetFunction(void** function, struct kernel* kernel) {
    CALLED("cuKernelGetFunction", "%s", kernel->name);
    *function = kernel;
    return SUCCESS;
}

int cuFuncLoad(struct kernel* function) {
    CALLED("cuFuncLoad", "%s", function->name);
    return SUCCESS;
}

int cuKernelSetAttribute(int attribute, int value, struct kernel* kernel, int device) {
    CALLED("cuKernelSetAttribute", "%s attribute %d value %d device %d", kernel->name, attribute, value,
           device);
    return SUCCESS;
}

int cuLaunchKernel(struct kernel* function, unsigned int x, unsigned int y, unsigned int z,
                   unsigned int threads, unsigned int threads_y, unsigned int threads_z, unsigned int shared,
                   void* stream, void** arguments, void** extra) {
    char text[1024] = "";
    for (int index = 0; index < function->arguments; ++index) {
        uint64_t bits = 0;
        memcpy(&bits, arguments[index], sizeof bits);
        snprintf(text + strlen(text), sizeof text - strlen(text), " %llu", (unsigned long long)bits);
    }
    CALLED("cuLaunchKernel", "%s grid %u %u %u block %u %u %u shared %u stream %llu extra %d arguments%s",
           function->name, x, y, z, threads, threads_y, threads_z, shared,
           (unsigned long long)(uintptr_t)stream, extra != NULL, text);
    return SUCCESS;
}

int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
    CALLED("cuMemAlloc", "%zu", bytes);
    for (int index = 0; index < MOST_ALLOCATIONS; ++index) {
        if (allocations[index] == NULL) {
            allocations[index] = aligned_alloc(256, (bytes + 255) / 256 * 256);
            *address = (uintptr_t)allocations[index];
            return SUCCESS;
        }
    }
    return OUT_OF_MEMORY;
}

int cuMemFree_v2(unsigned long long address) {
    CALLED("cuMemFree", "");
    for (int index = 0; index < MOST_ALLOCATIONS; ++index) {
        if ((uintptr_t)allocations[index] == address) {
            free(allocations[index]);
            allocations[index] = NULL;
            return SUCCESS;
        }
    }
    return OUT_OF_MEMORY;
}

int cuMemcpyHtoD_v2(unsigned long long address, const void* source, size_t bytes) {
    CALLED("cuMemcpyHtoD", "%zu first %d", bytes, bytes >= 4 ? *(const int*)source : 0);
    memcpy((void*)(uintptr_t)address, source, bytes);
    return SUCCESS;
}

int cuStreamSynchronize(void* stream) {
    CALLED("cuStreamSynchronize", "%d", stream != NULL);
    return SUCCESS;
}

/* What only the driver program of the plugin calls. */

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** retained, int device) {
    (void)device;
    *retained = &context;
    return SUCCESS;
}

int cuCtxSetCurrent(void* current) {
    (void)current;
    return SUCCESS;
}

int cuCtxSynchronize(void) {
    return SUCCESS;
}

int cuStreamCreate(void** stream, unsigned int flags) {
    CALLED("cuStreamCreate", "%u", flags);
    *stream = (void*)(uintptr_t)4242;
    return SUCCESS;
}

int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t bytes) {
    memset((void*)(uintptr_t)address, value, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void* target, unsigned long long address, size_t bytes) {
    memcpy(target, (const void*)(uintptr_t)address, bytes);
    return SUCCESS;
}

int cuStreamBeginCapture_v2(void* stream, int mode) {
    (void)stream;
    CALLED("cuStreamBeginCapture", "%d", mode);
    return SUCCESS;
}

int cuStreamEndCapture(void* stream, void** graph) {
    (void)stream;
    CALLED("cuStreamEndCapture", "");
    *graph = &context;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    (void)flags;
    *executable = graph;
    return SUCCESS;
}

int cuGraphLaunch(void* executable, void* stream) {
    (void)executable, (void)stream;
    CALLED("cuGraphLaunch", "");
    return SUCCESS;
}
