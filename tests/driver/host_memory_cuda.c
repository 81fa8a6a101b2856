/* Stands in for libcuda.so.1 where there is no GPU, for cuda.bindings and cuda.core: device memory is host
 * memory.
 *
 * Work runs at once, or when the graph it was captured into is launched. As on a GPU, a thread needs a
 * current context, and what a capture forbids spoils it. The kernel `entry` of any library does what run_kernel
 * says, all others nothing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    MOST_WORK = 256,
    DEFAULT_SHARED = 48 << 10,
    MAX_DYNAMIC_SHARED = 8,
    COMPUTE_MAJOR = 75,
    COMPUTE_MINOR = 76
};

typedef uint64_t address;

/* CUDA_MEMCPY2D of cuda.h. */
struct copy {
    size_t source_x, source_y;
    unsigned int source_type;
    const void* source_host;
    address source;
    void* source_array;
    size_t source_pitch, target_x, target_y;
    unsigned int target_type;
    void* target_host;
    address target;
    void* target_array;
    size_t target_pitch, width, height;
};

/* CUlaunchConfig of cuda.h. */
struct launch {
    unsigned int grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned int attribute_count;
};

struct work {
    enum { COPY, FILL, KERNEL, NOTHING } kind;
    struct copy copy;
    unsigned char value;
    struct launch launch;
    address out, in;
    int32_t count;
    float factor;
};

/* Of a graph, too. */
struct stream {
    int captures, spoiled, uploaded, count;
    struct work work[MOST_WORK];
};

static _Thread_local void* current;
static _Thread_local struct stream* capturing;
static int context, allowed_shared = DEFAULT_SHARED, late, idle;

#define NEEDS_CONTEXT                                                                                        \
    if (current == NULL) {                                                                                   \
        return INVALID_CONTEXT;                                                                              \
    }
#define NOT_IN_A_CAPTURE                                                                                     \
    NEEDS_CONTEXT                                                                                            \
    if (capturing != NULL) {                                                                                 \
        capturing->spoiled = 1;                                                                              \
        return CAPTURE_UNSUPPORTED;                                                                          \
    }

/* out[i] = in[i] * factor for i < count, then the launch itself: grid, block and shared memory. */
static void run_kernel(const struct work* work) {
    float* const out = (float*)work->out;
    const float* const in = (const float*)work->in;
    for (int32_t index = 0; index < work->count; ++index) {
        out[index] = in[index] * work->factor;
    }
    for (int axis = 0; axis < 3; ++axis) {
        out[work->count + axis] = (float)work->launch.grid[axis];
        out[work->count + 3 + axis] = (float)work->launch.block[axis];
    }
    out[work->count + 6] = (float)work->launch.shared;
}

static void run(const struct work* work) {
    const struct copy* const copy = &work->copy;
    if (work->kind == KERNEL) {
        run_kernel(work);
    }
    if (work->kind == KERNEL || work->kind == NOTHING) {
        return;
    }
    for (size_t row = 0; row < copy->height; ++row) {
        void* const target = (char*)copy->target + row * copy->target_pitch;
        if (work->kind == FILL) {
            memset(target, work->value, copy->width);
        } else {
            memmove(target, (const char*)copy->source + row * copy->source_pitch, copy->width);
        }
    }
}

static int enqueue(struct stream* stream, const struct work* work) {
    NEEDS_CONTEXT
    if (stream->captures) {
        if (stream->count == MOST_WORK) {
            return OUT_OF_MEMORY;
        }
        stream->work[stream->count++] = *work;
    } else {
        run(work);
    }
    return SUCCESS;
}

int cuInit(unsigned int flags) {
    return flags ? INVALID_VALUE : SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorName(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "an error";
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal ? INVALID_VALUE : SUCCESS;
}

int cuDeviceGetName(char* name, int length, int device) {
    (void)device;
    snprintf(name, (size_t)length, "Host Memory");
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    *value = attribute == COMPUTE_MAJOR ? 9 : 0;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** retained, int device) {
    *retained = &context;
    return device ? INVALID_VALUE : SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    return device ? INVALID_VALUE : SUCCESS;
}

int cuCtxGetCurrent(void** found) {
    *found = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void* wanted) {
    current = wanted;
    return SUCCESS;
}

int cuCtxGetDevice(int* device) {
    NEEDS_CONTEXT
    *device = 0;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t* available, size_t* total) {
    NEEDS_CONTEXT
    *available = 1000, *total = 2000;
    return SUCCESS;
}

int cuMemAlloc_v2(address* allocated, size_t bytes) {
    NOT_IN_A_CAPTURE
    if (bytes == 0 || bytes >> 40) {
        return bytes ? OUT_OF_MEMORY : INVALID_VALUE;
    }
    *allocated = (address)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return SUCCESS;
}

int cuMemFree_v2(address allocated) {
    NOT_IN_A_CAPTURE
    free((void*)allocated);
    return SUCCESS;
}

int cuMemHostAlloc(void** allocated, size_t bytes, unsigned int flags) {
    NOT_IN_A_CAPTURE
    *allocated = malloc(bytes);
    return flags == 1 ? SUCCESS : INVALID_VALUE;
}

int cuMemFreeHost(void* allocated) {
    NOT_IN_A_CAPTURE
    free(allocated);
    return SUCCESS;
}

int cuStreamCreate(struct stream** stream, unsigned int flags) {
    NOT_IN_A_CAPTURE
    *stream = calloc(1, sizeof **stream);
    return flags == 1 ? SUCCESS : INVALID_VALUE;
}

int cuStreamDestroy_v2(struct stream* stream) {
    NEEDS_CONTEXT
    free(stream);
    return SUCCESS;
}

int cuStreamSynchronize(struct stream* stream) {
    NOT_IN_A_CAPTURE
    return stream == NULL ? INVALID_VALUE : SUCCESS;
}

int cuStreamWaitEvent(struct stream* stream, void* event, unsigned int flags) {
    NEEDS_CONTEXT
    return stream == NULL || event == NULL || flags ? INVALID_VALUE : SUCCESS;
}

int cuEventCreate(void** event, unsigned int flags) {
    NOT_IN_A_CAPTURE
    *event = calloc(1, 16);
    return flags == 3 ? SUCCESS : INVALID_VALUE; /* waits asleep, takes no times */
}

int cuEventDestroy_v2(void* event) {
    NEEDS_CONTEXT
    free(event);
    return SUCCESS;
}

int cuEventRecord(void* event, struct stream* stream) {
    NEEDS_CONTEXT
    return stream == NULL || event == NULL ? INVALID_VALUE : SUCCESS;
}

int cuEventQuery(void* event) {
    NOT_IN_A_CAPTURE
    return event == NULL ? INVALID_VALUE : SUCCESS;
}

int cuEventSynchronize(void* event) {
    return cuEventQuery(event);
}

int cuMemcpyAsync(address target, address source, size_t bytes, struct stream* stream) {
    const struct work work = {.kind = COPY,
                              .copy = {.target = target, .source = source, .width = bytes, .height = 1}};
    return enqueue(stream, &work);
}

int cuMemcpy2DAsync_v2(const struct copy* copy, struct stream* stream) {
    const struct work work = {.kind = COPY, .copy = *copy};
    // Out of the device's memory (2), to wherever the address leads (4): pinned memory has one, too.
    if (copy->source_type != 2 || copy->target_type != 4 || copy->width > copy->source_pitch ||
        copy->width > copy->target_pitch || copy->source_x || copy->source_y || copy->target_x ||
        copy->target_y) {
        return INVALID_VALUE;
    }
    return enqueue(stream, &work);
}

int cuMemsetD8Async(address target, unsigned char value, size_t bytes, struct stream* stream) {
    const struct work work = {
        .kind = FILL, .copy = {.target = target, .width = bytes, .height = 1}, .value = value};
    return enqueue(stream, &work);
}

int cuStreamBeginCapture_v2(struct stream* stream, int mode) {
    NOT_IN_A_CAPTURE
    stream->captures = 1, stream->spoiled = 0, stream->count = 0;
    capturing = stream;
    return mode == 1 ? SUCCESS : INVALID_VALUE; /* thread-local */
}

int cuStreamEndCapture(struct stream* stream, struct stream** graph) {
    NEEDS_CONTEXT
    capturing = NULL;
    stream->captures = 0;
    *graph = NULL;
    if (stream->spoiled) {
        return CAPTURE_INVALIDATED;
    }
    *graph = malloc(sizeof **graph);
    **graph = *stream;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(struct stream** executable, const struct stream* graph,
                                unsigned long long flags) {
    *executable = malloc(sizeof **executable);
    **executable = *graph;
    (*executable)->uploaded = 0;
    return flags ? INVALID_VALUE : SUCCESS;
}

int cuGraphDestroy(struct stream* graph) {
    free(graph);
    return SUCCESS;
}

int cuGraphExecDestroy(struct stream* executable) {
    free(executable);
    return SUCCESS;
}

int cuGraphUpload(struct stream* executable, struct stream* stream) {
    NOT_IN_A_CAPTURE
    executable->uploaded = 1;
    return stream == NULL ? INVALID_VALUE : SUCCESS;
}

/* For tests: launches that had to put the graph onto the device themselves. */
int late_uploads(void) {
    return late;
}

int cuGraphLaunch(struct stream* executable, struct stream* stream) {
    late += !executable->uploaded;
    executable->uploaded = 1;
    for (int index = 0; index < executable->count; ++index) {
        const int error = enqueue(stream, &executable->work[index]);
        if (error) {
            return error;
        }
    }
    return SUCCESS;
}

int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned int c, void* d, void* e,
                      unsigned int f) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    NOT_IN_A_CAPTURE
    *library = (void*)code;
    return SUCCESS;
}

int cuLibraryUnload(void* library) {
    (void)library;
    return SUCCESS;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = strcmp(name, "entry") ? &idle : library;
    return library == NULL || *name == '\0' ? NOT_FOUND : SUCCESS;
}

int cuKernelGetLibrary(void** library, void* kernel) {
    *library = kernel;
    return SUCCESS;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    if (attribute != MAX_DYNAMIC_SHARED || kernel == NULL || device) {
        return INVALID_VALUE;
    }
    allowed_shared = value;
    return SUCCESS;
}

int cuLaunchKernelEx(const struct launch* config, void* kernel, void** arguments, void** extra) {
    struct work work = {.kind = kernel == &idle ? NOTHING : KERNEL, .launch = *config};
    address nothing[2];
    if (kernel == &idle) {
        return enqueue(config->stream, &work);
    }
    memcpy(&work.out, arguments[0], sizeof work.out);
    memcpy(&work.in, arguments[1], sizeof work.in);
    memcpy(&work.count, arguments[2], sizeof work.count);
    memcpy(&work.factor, arguments[3], sizeof work.factor);
    memcpy(&nothing[0], arguments[4], sizeof nothing[0]);
    memcpy(&nothing[1], arguments[5], sizeof nothing[1]);
    if (kernel == NULL || extra != NULL || nothing[0] || nothing[1] || config->attribute_count ||
        (int)config->shared > allowed_shared) {
        return INVALID_VALUE;
    }
    return enqueue(config->stream, &work);
}

static int not_supported(void) {
    return NOT_SUPPORTED;
}

/* cuda.bindings asks for every function by its plain name. */
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags,
                        int* status) {
    Dl_info here, found;
    char full[128];
    (void)version, (void)flags;
    snprintf(full, sizeof full, "%s_v2", name);
    dladdr((void*)cuGetProcAddress_v2, &here);
    void* const library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(library, full);
    if (*function == NULL) {
        *function = dlsym(library, name);
    }
    if (*function == NULL || !dladdr(*function, &found) || found.dli_fbase != here.dli_fbase) {
        *function = (void*)not_supported;
    }
    if (status != NULL) {
        *status = 0;
    }
    return SUCCESS;
}
