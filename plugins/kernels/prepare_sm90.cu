// QKPrepare in one pass over the merged projection: bias, RMS norm, RoPE and block means. A warp owns whole rows, so that
// nothing of a row passes through shared memory; a thread block owns a whole block, whose mean it sums in a fixed order.
// Compiled with
//   HEADS      heads of 128, an even number
//   WARPS      of a thread block
//   HALF       1: float16, 0: bfloat16

#include "hopper.cuh"

namespace {

constexpr int kWidth = HEADS * 128;
constexpr int kPieces = kWidth / 256;    // of 8 columns, of a thread: piece i begins at column 8 * (lane + 32 * i)
constexpr int kThreads = 32 * WARPS;

struct alignas(16) Floats4 {
    float value[4];
};

// What a thread reads of a row.
struct Row {
    Bytes16 pieces[kPieces];
    Floats4 cosine, sine;    // 256 columns are two heads: the same four pairs in all pieces
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) prepare(
    uint16_t* __restrict__ q, uint16_t* __restrict__ k, uint16_t* __restrict__ v, float* __restrict__ q_mean,
    float* __restrict__ k_mean, const uint16_t* __restrict__ qkv, const uint16_t* __restrict__ bias,
    const uint16_t* __restrict__ norm_q, const uint16_t* __restrict__ norm_k, const float* __restrict__ cos,
    const float* __restrict__ sin, int frame_tokens, int block_q, int block_k, int q_blocks, int k_blocks,
    int chunk_frames, float eps) {
    extern __shared__ uint8_t dynamic[];
    Bytes16* const shifts = reinterpret_cast<Bytes16*>(dynamic);
    Bytes16* const scales = shifts + kWidth / 8;
    float* const sums = reinterpret_cast<float*>(scales + kWidth / 8);

    const int role = blockIdx.y;
    const int block = role == 0 ? block_q : block_k;
    const int blocks = role == 0 ? q_blocks : k_blocks;
    const int index = blockIdx.x;
    if (index >= chunk_frames * blocks) return;
    const int start = index % blocks * block;
    const int rows = min(block, frame_tokens - start);
    const int token = index / blocks * frame_tokens + start;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

    const Bytes16* const norm = reinterpret_cast<const Bytes16*>(role == 0 ? norm_q : norm_k);
    for (int i = thread; i < kWidth / 8; i += kThreads) {
        shifts[i] = reinterpret_cast<const Bytes16*>(bias + role * kWidth)[i];
        scales[i] = norm[i];
    }
    __syncthreads();

    const uint16_t* const from = qkv + static_cast<uint64_t>(token) * 3 * kWidth + role * kWidth;
    uint16_t* const to = (role == 0 ? q : role == 1 ? k : v) + static_cast<uint64_t>(token) * kWidth;
    auto read = [&](int row) {
        Row next;
        const Bytes16* pieces = reinterpret_cast<const Bytes16*>(from + static_cast<uint64_t>(row) * 3 * kWidth) + lane;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) next.pieces[i] = pieces[32 * i];
        if (role < 2) {
            const uint64_t angle = static_cast<uint64_t>(token + row) * 64 + lane % 16 * 4;
            next.cosine = *reinterpret_cast<const Floats4*>(cos + angle);
            next.sine = *reinterpret_cast<const Floats4*>(sin + angle);
        }
        return next;
    };

    float total[8 * kPieces];
#pragma unroll
    for (int i = 0; i < 8 * kPieces; ++i) total[i] = 0.0f;
    Row next;
    if (warp < rows) next = read(warp);
    for (int row = warp; row < rows; row += WARPS) {
        const Row here = next;
        if (row + WARPS < rows) next = read(row + WARPS);
        float x[8 * kPieces];
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            float shift[8];
            unpack(here.pieces[i], x + 8 * i);
            unpack(shifts[lane + 32 * i], shift);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[8 * i + j] += shift[j];
                squares = fmaf(x[8 * i + j], x[8 * i + j], squares);
            }
        }
        if (role < 2) {
#pragma unroll
            for (int mask = 16; mask > 0; mask /= 2) squares += __shfl_xor_sync(~0u, squares, mask);
            const float inverse = rsqrtf(squares / kWidth + eps);
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                float scale[8];
                unpack(scales[lane + 32 * i], scale);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const float even = x[8 * i + j] * inverse * scale[j];
                    const float odd = x[8 * i + j + 1] * inverse * scale[j + 1];
                    const float c = here.cosine.value[j / 2], s = here.sine.value[j / 2];
                    x[8 * i + j] = even * c - odd * s;
                    x[8 * i + j + 1] = even * s + odd * c;
                }
            }
        }
        Bytes16* const out = reinterpret_cast<Bytes16*>(to + static_cast<uint64_t>(row) * kWidth) + lane;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const float* y = x + 8 * i;
            const Bytes16 rounded{pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7])};
            out[32 * i] = rounded;
            float back[8];
            unpack(rounded, back);
#pragma unroll
            for (int j = 0; j < 8; ++j) total[8 * i + j] += back[j];
        }
    }
    if (role == 2) return;

#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[warp * kWidth + j * (kWidth / 8) + lane + 32 * i] = total[8 * i + j];
    }
    __syncthreads();
    float* const mean = (role == 0 ? q_mean : k_mean) + static_cast<uint64_t>(index) * kWidth;
    for (int column = thread; column < kWidth; column += kThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w * kWidth + column % 8 * (kWidth / 8) + column / 8];
        mean[column] = sum / rows;
    }
}
