/* C interface to the attention kernels: both operators on device memory, without TensorRT, PyTorch or cudart.
 *
 * The library holds the compiled kernels of every architecture it was built for and opens libcuda.so.1 when
 * it first needs a GPU; everything but *_load and *_enqueue works without one. What the operators compute is
 * defined in docs/operators.md; docs/tensorrt_plugin.md shows how to call them.
 *
 * Every call returns a status. Where it is not LF_OK, lf_last_error() says what was found, what was expected
 * and what to do. Nothing throws. Calls on different handles may run in parallel; those on one handle may
 * not, except that several threads may enqueue on a loaded handle. */

#ifndef LIGHTFORCING_LAUNCH_H
#define LIGHTFORCING_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#define LF_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lf_status {
    LF_OK = 0,
    LF_INVALID_ARGUMENT = 1, /* a value outside of the operator's contract */
    LF_NOT_SERVED = 2,       /* no embedded kernel computes this problem, or runs on this device */
    LF_NO_DRIVER = 3,        /* no NVIDIA driver, or one that is too old */
    LF_CUDA_FAILURE = 4,     /* a call to the driver failed */
    LF_NOT_LOADED = 5,       /* *_enqueue before *_load */
    LF_INTERNAL = 6          /* out of host memory, or a defect of this library */
} lf_status;

typedef enum lf_dtype { LF_FLOAT32 = 0, LF_FLOAT16 = 1, LF_BFLOAT16 = 2 } lf_dtype;

/* Why the last failing call of this thread failed; an empty string if none has. Valid until the next failure.
 */
LF_API const char* lf_last_error(void);

/* Architectures with embedded kernels, separated by spaces, such as "sm_80 sm_90a". */
LF_API const char* lf_architectures(void);

/* Whether any embedded kernel computes in `dtype`, an lf_dtype: 1 or 0. */
LF_API int lf_serves_dtype(int32_t dtype);

/* Sizes of one call that the tensors bring along. */
typedef struct lf_shape {
    int32_t dtype;        /* lf_dtype of q, k, v, the caches and the output */
    int32_t heads;        /* H */
    int32_t head_dim;     /* D */
    int32_t chunk_frames; /* C, frames of the current chunk; T = C * frame_tokens */
    int32_t past_frames;  /* F, length of frame_slots; 0 for QKPrepare */
} lf_shape;

/* ------------------------------------------------------------------------------------------------------------------
 * HierarchicalSparseAttention */

typedef struct lf_attention lf_attention;

typedef struct lf_attention_attributes {
    int32_t frame_tokens;
    int32_t block_q;
    int32_t block_k;
    int32_t keep_frames;
    int32_t sink_frames;
    int32_t near_frames;
    float scale;
    const int32_t* keep_q20; /* copied by lf_attention_create */
    int32_t keep_q20_count;
} lf_attention_attributes;

/* Device addresses, each a multiple of 16 and contiguous. The past_* may be NULL where no slot exists,
 * frame_slots where past_frames is 0. */
typedef struct lf_attention_buffers {
    const void* q;
    const void* k;
    const void* v;
    const void* q_mean;
    const void* k_mean;
    const void* past_k;
    const void* past_v;
    const void* past_kmean;
    const void* frame_slots;
    const void* chunk;
    void* out;
} lf_attention_buffers;

/* Checks the attributes and makes a handle for them. Needs no GPU. */
LF_API lf_status lf_attention_create(const lf_attention_attributes* attributes, lf_attention** attention);

/* Frees the handle and what it holds on the device. Enqueued work must have ended. NULL is allowed. */
LF_API void lf_attention_destroy(lf_attention* attention);

/* Checks that a kernel serves `shape` (on the loaded device, or before loading on any) and gives the exact
 * number of bytes of device memory that lf_attention_enqueue needs to work in. */
LF_API lf_status lf_attention_workspace(const lf_attention* attention, const lf_shape* shape, size_t* bytes);

/* Loads the kernels and the table onto the device of the CUDA context that is current in this thread.
 * Allocates and synchronises: call it before a capture. Loading again does nothing. */
LF_API lf_status lf_attention_load(lf_attention* attention);

/* Launches the operator on `stream` (a CUstream or cudaStream_t) of the loaded device. Asynchronous:
 * allocates nothing, waits for nothing, reads no device memory on the host, and can be captured into a CUDA
 * graph, which then is right for every content of frame_slots and chunk. */
LF_API lf_status lf_attention_enqueue(const lf_attention* attention, const lf_shape* shape,
                                      const lf_attention_buffers* buffers, void* workspace,
                                      size_t workspace_bytes, void* stream);

/* ------------------------------------------------------------------------------------------------------------------
 * QKPrepare: the same life cycle; it needs no memory to work in. */

typedef struct lf_prepare lf_prepare;

typedef struct lf_prepare_attributes {
    int32_t heads;
    int32_t frame_tokens;
    int32_t block_q;
    int32_t block_k;
    float eps;
} lf_prepare_attributes;

typedef struct lf_prepare_buffers {
    const void* qkv;
    const void* bias;
    const void* norm_q;
    const void* norm_k;
    const void* cos;
    const void* sin;
    void* q;
    void* k;
    void* v;
    void* q_mean;
    void* k_mean;
} lf_prepare_buffers;

LF_API lf_status lf_prepare_create(const lf_prepare_attributes* attributes, lf_prepare** prepare);
LF_API void lf_prepare_destroy(lf_prepare* prepare);
LF_API lf_status lf_prepare_check(const lf_prepare* prepare, const lf_shape* shape);
LF_API lf_status lf_prepare_load(lf_prepare* prepare);
LF_API lf_status lf_prepare_enqueue(const lf_prepare* prepare, const lf_shape* shape,
                                    const lf_prepare_buffers* buffers, void* stream);

/* ------------------------------------------------------------------------------------------------------------------
 * Planning only: which kernel would run, and how. For tests and tools; needs no GPU. */

enum { LF_MAX_ARGUMENTS = 32 };

/* Sizes of one kernel launch: those of the call, with the blocks of the operator. */
typedef struct lf_problem {
    int32_t dtype; /* lf_dtype */
    int32_t heads;
    int32_t head_dim;
    int32_t frame_tokens;
    int32_t chunk_frames;
    int32_t past_frames;
    int32_t block_q;
    int32_t block_k;
} lf_problem;

/* A buffer's device address or an option's number; the name decides which of the two counts. */
typedef struct lf_value {
    const char* name;
    uint64_t address;
    double number;
} lf_value;

typedef struct lf_plan {
    const char* image; /* name of the chosen kernel image */
    const void* cubin; /* its code, embedded in this library */
    size_t cubin_bytes;
    uint32_t grid[3];
    uint32_t threads;
    uint32_t shared_memory;
    uint32_t argument_count;
    uint64_t arguments[LF_MAX_ARGUMENTS]; /* bits of each argument; 32-bit ones in the lower half */
} lf_plan;

/* Chooses and lays out `kernel` ("prepare", "score", "select" or "attend") for a device of compute capability
 * `capability` (major * 10 + minor). */
LF_API lf_status lf_make_plan(int32_t capability, const char* kernel, const lf_problem* problem,
                              const lf_value* values, size_t value_count, lf_plan* plan);

#ifdef __cplusplus
}
#endif

#endif
