// Block-sparse flash attention for Hopper: one producer and two consumer warpgroups.
//
// The producer copies keys and values of the listed blocks into a ring in shared memory. Each consumer owns 64 of the
// 128 query rows; it issues the product of the next keys before it turns the last logits into weights, and the two take
// turns, so that the exponentials of one run during the products of the other. A step is a chain, products wait for
// weights and weights for products: 72 instructions more in it (of 574) cost 10 % on an H200. Compiled with
//   K_TILE     keys of a step: 64 or 128
//   STAGES     steps that the ring holds
//   TURNS      1: the consumers take turns in issuing products
//   HALF       1: float16, 0: bfloat16
// Serves head size 128, query blocks of 128, and blocks that divide the frame. Layouts of wgmma operands and
// descriptors: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

#include "hopper.cuh"

namespace {

constexpr int kHeadDim = 128;
constexpr int kRows = 128;        // of a query block
constexpr int kGroup = 128;       // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kRowBytes = 128;    // of a row in shared memory: half a head, so that a row is one swizzle span
constexpr int kQBytes = kRows * kHeadDim * 2;
constexpr int kTileBytes = K_TILE * kHeadDim * 2;
constexpr int kHalfTile = K_TILE * kRowBytes;
constexpr int kHalfQ = kRows * kRowBytes;
constexpr int kLogits = K_TILE / 2;    // of a thread, in a step
constexpr int kEntryBits = 16;
#define kInfinity __int_as_float(0x7f800000)
constexpr float kLog2E = 1.4426950408889634f;

// Descriptor of a tile whose rows are 128 bytes, swizzled over 8 rows; `leading` is the distance of its two halves where
// rows run along the summed dimension, and unused where columns do.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    constexpr uint64_t kEightRows = static_cast<uint64_t>(8 * kRowBytes >> 4) << 32;
    return kSwizzle128 | kEightRows | static_cast<uint64_t>(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// Place of a 16-byte piece in a tile of two halves: rows of 128 bytes, pieces exchanged by the row's last three bits.
__device__ __forceinline__ uint32_t place(int row, int piece, int half_bytes) {
    return (piece >> 3) * half_bytes + row * kRowBytes + (((piece & 7) ^ (row & 7)) << 4);
}

// Position in a ring of `Stages`: index and the parity of its barriers.
template <int Stages>
struct Ring {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == Stages) {
            index = 0;
            parity ^= 1;
        }
    }
};

struct Shared {
    uint32_t q, k, v, full_q, empty_q, full_k, empty_k, full_v, empty_v;
    __device__ explicit Shared(uint32_t base)
        : q(base), k(q + kQBytes), v(k + STAGES * kTileBytes), full_q(v + STAGES * kTileBytes), empty_q(full_q + 8),
          full_k(empty_q + 8), empty_k(full_k + 8 * STAGES), full_v(empty_k + 8 * STAGES), empty_v(full_v + 8 * STAGES) {
    }
};

// The part of the work that this block does in turn `turn`: whole query blocks while there is one for every block, then,
// where that gives more blocks something to do, halves of them.
struct Item {
    int row;       // head * query_blocks + query block
    int half;      // -1: both
    bool valid;
    __device__ Item(int block, int blocks, int turn, int items) {
        const int whole = items / blocks * blocks;
        const int left = items - whole;
        const int index = turn * blocks + block;
        half = -1;
        row = index;
        valid = index < items;
        if (index >= whole && turn > 0 && 2 * left <= blocks) {
            row = whole + block / 2;
            half = block & 1;
            valid = turn == items / blocks && block < 2 * left;
        }
    }
};

__device__ __forceinline__ int query_token(int query_block, int q_blocks, int frame_tokens) {
    return query_block / q_blocks * frame_tokens + query_block % q_blocks * kRows;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend(
    uint16_t* __restrict__ out, const uint16_t* __restrict__ q, const uint16_t* __restrict__ k,
    const uint16_t* __restrict__ v, const uint16_t* __restrict__ past_k, const uint16_t* __restrict__ past_v,
    const int* __restrict__ frame_slots, const int* __restrict__ lists, const int* __restrict__ counts, int heads,
    int frame_tokens, int past_frames, int query_blocks, int q_blocks, int key_blocks, int block_k, float scale) {
    extern __shared__ uint8_t dynamic[];
    const Shared shared((shared_address(dynamic) + 1023) & ~1023u);
    const int group = threadIdx.x / kGroup;
    const int thread = threadIdx.x % kGroup;
    const int lane = thread % 32;

    if (threadIdx.x == 0) {
        barrier_init(shared.full_q, kGroup);
        barrier_init(shared.empty_q, 8);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared.full_k + 8 * i, kGroup);
            barrier_init(shared.full_v + 8 * i, kGroup);
            barrier_init(shared.empty_k + 8 * i, 8);
            barrier_init(shared.empty_v + 8 * i, 8);
        }
        barriers_ready();
    }
    __syncthreads();

    const int block = blockIdx.x + gridDim.x * blockIdx.y;
    const int blocks = gridDim.x * gridDim.y;
    const int items = query_blocks * heads;
    const int stride = heads * kHeadDim;
    // Steps of a key block: 1 or 2.
    const int shift = block_k / K_TILE >> 1;

    if (group == 0) {
        registers_give<40>();
        const int slot_here = lane < past_frames ? frame_slots[lane] : -1;
        const int present = __popc(__ballot_sync(~0u, slot_here >= 0));
        // This thread's 16 bytes of a row, and its first row: it takes every eighth.
        const int piece = thread % 16;
        const int first_row = thread / 16;
        const uint32_t to = place(first_row, piece, kHalfTile);
        const uint64_t row_step = static_cast<uint64_t>(8) * stride;
        Ring<STAGES> ring;
        uint32_t q_parity = 1;
        for (int turn = 0;; ++turn) {
            const Item item(block, blocks, turn, items);
            if (!item.valid) break;
            const int head = item.row / query_blocks;
            const uint64_t column = static_cast<uint64_t>(head) * kHeadDim + piece * 8;

            barrier_wait(shared.empty_q, q_parity);
            q_parity ^= 1;
            const int token = query_token(item.row % query_blocks, q_blocks, frame_tokens) + first_row;
            const uint16_t* from = q + static_cast<uint64_t>(token) * stride + column;
            const uint32_t q_to = shared.q + place(first_row, piece, kHalfQ);
#pragma unroll 4
            for (int i = 0; i < kRows / 8; ++i) copy16(q_to + i * 8 * kRowBytes, from + i * row_step);
            barrier_arrive_after_copies(shared.full_q);

            const int* entries = lists + static_cast<uint64_t>(item.row) * key_blocks;
            const int steps = counts[item.row] << shift;
            int token_here = 0, past_here = 0;
            for (int step = 0; step < steps; ++step) {
                if (step % 32 == 0) {
                    // Each lane resolves one of the next 32 steps.
                    const int mine = step + lane;
                    const int entry = mine < steps ? __ldg(entries + (mine >> shift)) : 0;
                    const int frame = entry >> kEntryBits;
                    const int start =
                        (entry & ((1 << kEntryBits) - 1)) * block_k + (mine & ((1 << shift) - 1)) * K_TILE;
                    const int slot = __shfl_sync(~0u, slot_here, frame);
                    past_here = frame < present;
                    token_here = (past_here ? slot : frame - present) * frame_tokens + start;
                }
                const int key_token = __shfl_sync(~0u, token_here, step % 32) + first_row;
                const bool past = __shfl_sync(~0u, past_here, step % 32);
                const uint64_t offset = static_cast<uint64_t>(key_token) * stride + column;

                barrier_wait(shared.empty_k + 8 * ring.index, ring.parity ^ 1);
                const uint16_t* keys = (past ? past_k : k) + offset;
                const uint32_t k_to = shared.k + ring.index * kTileBytes + to;
#pragma unroll
                for (int i = 0; i < K_TILE / 8; ++i) copy16(k_to + i * 8 * kRowBytes, keys + i * row_step);
                barrier_arrive_after_copies(shared.full_k + 8 * ring.index);

                barrier_wait(shared.empty_v + 8 * ring.index, ring.parity ^ 1);
                const uint16_t* values = (past ? past_v : v) + offset;
                const uint32_t v_to = shared.v + ring.index * kTileBytes + to;
#pragma unroll
                for (int i = 0; i < K_TILE / 8; ++i) copy16(v_to + i * 8 * kRowBytes, values + i * row_step);
                barrier_arrive_after_copies(shared.full_v + 8 * ring.index);
                ring.advance();
            }
        }
        copies_wait();
    } else {
        registers_take<232>();
        const int consumer = group - 1;
        const int warp = thread / 32;
        const float to_log2 = scale * kLog2E;
        // The descriptor's halves do not matter where columns run along the summed dimension.
        const uint64_t q_descriptor = descriptor(shared.q + consumer * 64 * kRowBytes, 16);
        constexpr int kMine = 1, kTurnThreads = 2 * kGroup;
        if (TURNS && consumer == 1) named_arrive(kMine, kTurnThreads);

        Ring<STAGES> k_ring, v_ring;
        uint32_t q_parity = 0;
        float logits[kLogits];
        float output[64];
        uint32_t weights[kLogits / 2];

        auto release = [&](uint32_t barrier) {
            __syncwarp();
            if (lane == 0) barrier_arrive(barrier);
        };
        auto issue_qk = [&] {
            const uint64_t k_descriptor = descriptor(shared.k + k_ring.index * kTileBytes, 16);
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                // 16 columns are 32 bytes; after 64 columns comes the other half.
                const uint32_t half = i / 4, bytes = i % 4 * 32;
                product_qk(logits, q_descriptor + ((half * kHalfQ + bytes) >> 4),
                           k_descriptor + ((half * kHalfTile + bytes) >> 4), i > 0);
            }
            products_commit();
        };
        auto issue_pv = [&] {
            const uint64_t v_descriptor = descriptor(shared.v + v_ring.index * kTileBytes, kHalfTile);
#pragma unroll
            for (int i = 0; i < K_TILE / 16; ++i)
                product_pv(output, weights + 4 * i, v_descriptor + (i * 16 * kRowBytes >> 4));
            products_commit();
        };
        auto pack_weights = [&] {
#pragma unroll
            for (int i = 0; i < kLogits / 2; ++i) weights[i] = pack(logits[2 * i], logits[2 * i + 1]);
        };

        for (int turn = 0;; ++turn) {
            const Item item(block, blocks, turn, items);
            if (!item.valid) break;
            const int steps = counts[item.row] << shift;
            if (item.half >= 0 && item.half != consumer) {
                // The other half is another block's: take the steps without the work.
                barrier_wait(shared.full_q, q_parity);
                q_parity ^= 1;
                for (int step = 0; step < steps; ++step) {
                    barrier_wait(shared.full_k + 8 * k_ring.index, k_ring.parity);
                    if (TURNS && step > 0) {
                        named_sync(kMine + consumer, kTurnThreads);
                        named_arrive(kMine + 1 - consumer, kTurnThreads);
                    }
                    release(shared.empty_k + 8 * k_ring.index);
                    k_ring.advance();
                    barrier_wait(shared.full_v + 8 * v_ring.index, v_ring.parity);
                    release(shared.empty_v + 8 * v_ring.index);
                    v_ring.advance();
                }
                release(shared.empty_q);
                continue;
            }

            // Rows of a thread: lane / 4 and that plus 8 of its warp's 16; of 8 columns two, from 2 * (lane % 4) on.
            float best[2] = {-kInfinity, -kInfinity};
            float norm[2] = {0.0f, 0.0f};
            float decay[2];
            // Logits to weights; the sums over the four threads of a row wait for the end.
            auto softmax = [&] {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float top = logits[2 * r];
#pragma unroll
                    for (int i = 0; i < kLogits / 4; ++i)
                        top = fmaxf(top, fmaxf(logits[4 * i + 2 * r], logits[4 * i + 2 * r + 1]));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                    const float now = fmaxf(best[r], top * to_log2);
                    decay[r] = exp2_fast(best[r] - now);
                    best[r] = now;
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < kLogits / 4; ++i) {
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            float& x = logits[4 * i + 2 * r + c];
                            x = exp2_fast(fmaf(x, to_log2, -now));
                            sum += x;
                        }
                    }
                    norm[r] = fmaf(norm[r], decay[r], sum);
                }
            };

#pragma unroll
            for (int i = 0; i < 64; ++i) output[i] = 0.0f;
            barrier_wait(shared.full_q, q_parity);
            q_parity ^= 1;
            if (steps > 0) {
                barrier_wait(shared.full_k + 8 * k_ring.index, k_ring.parity);
                fence_for_products();
                pin(logits);
                products_begin();
                issue_qk();
                products_wait<0>();
                pin(logits);
                release(shared.empty_k + 8 * k_ring.index);
                k_ring.advance();
                softmax();
                pack_weights();
                for (int step = 1; step < steps; ++step) {
                    barrier_wait(shared.full_k + 8 * k_ring.index, k_ring.parity);
                    barrier_wait(shared.full_v + 8 * v_ring.index, v_ring.parity);
                    fence_for_products();
                    if (TURNS) named_sync(kMine + consumer, kTurnThreads);
                    pin(logits);
                    pin(output);
                    products_begin();
                    issue_qk();
                    issue_pv();
                    if (TURNS) named_arrive(kMine + 1 - consumer, kTurnThreads);
                    products_wait<1>();
                    pin(logits);
                    release(shared.empty_k + 8 * k_ring.index);
                    k_ring.advance();
                    softmax();
                    pin(logits);
                    finish_before_waiting(norm[0] + norm[1], shared.q);
                    products_wait<0>();
                    pin(output);
                    release(shared.empty_v + 8 * v_ring.index);
                    v_ring.advance();
                    pack_weights();
#pragma unroll
                    for (int i = 0; i < 64; ++i) output[i] *= decay[i / 2 % 2];
                }
                barrier_wait(shared.full_v + 8 * v_ring.index, v_ring.parity);
                fence_for_products();
                pin(output);
                products_begin();
                issue_pv();
                products_wait<0>();
                pin(output);
                release(shared.empty_v + 8 * v_ring.index);
                v_ring.advance();
            }

            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = norm[r];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                inverse[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
            }
            // Through the place of these queries, so that whole rows are written. All warps must be done with them.
            named_sync(3 + consumer, kGroup);
            const uint32_t stage = shared.q + consumer * 64 * kRowBytes;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = warp * 16 + lane / 4 + 8 * r;
                    const uint32_t pair =
                        pack(output[4 * j + 2 * r] * inverse[r], output[4 * j + 2 * r + 1] * inverse[r]);
                    store_shared(stage + place(row, j, kHalfQ) + lane % 4 * 4, pair);
                }
            }
            named_sync(3 + consumer, kGroup);
            const int head = item.row / query_blocks;
            const int token =
                query_token(item.row % query_blocks, q_blocks, frame_tokens) + consumer * 64 + thread / 16;
            uint16_t* target =
                out + static_cast<uint64_t>(token) * stride + static_cast<uint64_t>(head) * kHeadDim + thread % 16 * 8;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t from = stage + place(thread / 16 + 8 * i, thread % 16, kHalfQ);
                store_global(target + static_cast<uint64_t>(i) * 8 * stride, load_shared(from));
            }
            release(shared.empty_q);
        }
    }
}
