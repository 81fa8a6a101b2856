// Block-sparse flash attention for Hopper: one producer and two consumer warpgroups.
//
// The producer copies keys and values of the listed blocks into a ring in shared memory. Each consumer owns 64 of the
// 128 query rows; it issues the product of the next keys before it turns the last logits into weights, and the two take
// turns, so that the exponentials of one run during the products of the other. Compiled with
//   K_TILE     keys of a step: 64, or 128, which may be two key blocks of 64
//   STAGES     steps that the ring holds
//   TURNS      1: the consumers take turns in issuing products
//   HOLD       1: queries stay in registers
//   LAZY       1: the output is scaled down only where the largest logit has risen a lot
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
constexpr int kQStages = 2;       // the next queries are there before these are done
constexpr int kTileBytes = K_TILE * kHeadDim * 2;
constexpr int kHalfTile = K_TILE * kRowBytes;
constexpr int kHalfQ = kRows * kRowBytes;
constexpr int kUnit = 64;         // keys that lie together, whatever the key block
constexpr int kUnits = K_TILE / kUnit;
constexpr int kLogits = K_TILE / 2;    // of a thread, in a step
constexpr int kEntryBits = 16;
constexpr int kPast = 1 << 30;    // marks a token of the past
#define kInfinity __int_as_float(0x7f800000)
constexpr float kSlack = 8.0f;     // weights grow up to 2 to this before they are scaled down
constexpr float kLog2E = 1.4426950408889634f;

// The low half of the descriptor of a tile whose rows are 128 bytes, swizzled over 8 rows. `leading` is the distance of
// the tile's two halves where rows run along the summed dimension; where columns do, it does not matter. A warp's
// threads are known to agree on it, so that it is kept in uniform registers.
__device__ __forceinline__ uint32_t descriptor(uint32_t address, uint32_t leading) {
    return __shfl_sync(~0u, leading >> 4 << 16 | (address & 0x3FFFF) >> 4, 0);
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
    __device__ __forceinline__ void advance(int by = 1) {
        index += by;
        if (index >= Stages) {
            index -= Stages;
            parity ^= 1;
        }
    }
};

struct Shared {
    uint32_t q, k, v, full_q, empty_q, full_k, empty_k, full_v, empty_v;
    __device__ explicit Shared(uint32_t base)
        : q(base), k(q + kQStages * kQBytes), v(k + STAGES * kTileBytes), full_q(v + STAGES * kTileBytes),
          empty_q(full_q + 8 * kQStages), full_k(empty_q + 8 * kQStages), empty_k(full_k + 8 * STAGES), full_v(empty_k + 8 * STAGES), empty_v(full_v + 8 * STAGES) {
    }
};

// The part of the work that this block does in turn `turn`: whole query blocks while there is one for every block, then,
// where that gives more blocks something to do, halves of them. The consumers then share the keys instead of the rows.
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
        for (int i = 0; i < kQStages; ++i) {
            barrier_init(shared.full_q + 8 * i, kGroup);
            barrier_init(shared.empty_q + 8 * i, 8);
        }
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
    // Units of a key block: 1 or 2.
    const int shift = block_k / kUnit >> 1;

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
        Ring<kQStages> q_ring;
        for (int turn = 0;; ++turn) {
            const Item item(block, blocks, turn, items);
            if (!item.valid) break;
            const int head = item.row / query_blocks;
            const uint64_t column = static_cast<uint64_t>(head) * kHeadDim + piece * 8;

            barrier_wait(shared.empty_q + 8 * q_ring.index, q_ring.parity ^ 1);
            const int token = query_token(item.row % query_blocks, q_blocks, frame_tokens) + first_row;
            const uint16_t* from = q + static_cast<uint64_t>(token) * stride + column;
            const uint32_t q_to = shared.q + q_ring.index * kQBytes + place(first_row, piece, kHalfQ);
#pragma unroll 4
            for (int i = 0; i < kRows / 8; ++i) copy16(q_to + i * 8 * kRowBytes, from + i * row_step);
            barrier_arrive_after_copies(shared.full_q + 8 * q_ring.index);
            q_ring.advance();

            const int* entries = lists + static_cast<uint64_t>(item.row) * key_blocks;
            const int units = counts[item.row] << shift;
            constexpr int kStepsAtOnce = 32 / kUnits;
            int token_here = 0;
            for (int step = 0; step * kUnits < units; ++step) {
                if (step % kStepsAtOnce == 0) {
                    // Each lane resolves one of the next 32 units. If they are odd, the first step takes the first twice.
                    const int mine = max(0, min(step * kUnits + lane - units % kUnits, units - 1));
                    const int entry = __ldg(entries + (mine >> shift));
                    const int frame = entry >> kEntryBits;
                    const int start =
                        (entry & ((1 << kEntryBits) - 1)) * block_k + (mine & ((1 << shift) - 1)) * kUnit;
                    const int slot = __shfl_sync(~0u, slot_here, frame);
                    const bool past = frame < present;
                    token_here = (past ? slot : frame - present) * frame_tokens + start;
                    if (past) token_here |= kPast;
                }
                bool past[kUnits];
                uint64_t offset[kUnits];
#pragma unroll
                for (int u = 0; u < kUnits; ++u) {
                    const int token = __shfl_sync(~0u, token_here, step % kStepsAtOnce * kUnits + u);
                    past[u] = token & kPast;
                    offset[u] = static_cast<uint64_t>((token & ~kPast) + first_row) * stride + column;
                }
                auto copy_tile = [&](uint32_t tile, const uint16_t* before, const uint16_t* now) {
#pragma unroll
                    for (int u = 0; u < kUnits; ++u) {
                        const uint16_t* rows = (past[u] ? before : now) + offset[u];
#pragma unroll
                        for (int i = 0; i < kUnit / 8; ++i)
                            copy16(tile + to + (u * kUnit + i * 8) * kRowBytes, rows + i * row_step);
                    }
                };
                barrier_wait(shared.empty_k + 8 * ring.index, ring.parity ^ 1);
                copy_tile(shared.k + ring.index * kTileBytes, past_k, k);
                barrier_arrive_after_copies(shared.full_k + 8 * ring.index);
                barrier_wait(shared.empty_v + 8 * ring.index, ring.parity ^ 1);
                copy_tile(shared.v + ring.index * kTileBytes, past_v, v);
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
        constexpr int kMine = 1, kTurnThreads = 2 * kGroup;
        if (TURNS && consumer == 1) named_arrive(kMine, kTurnThreads);

        Ring<STAGES> k_ring, v_ring;
        Ring<kQStages> q_ring;
        float logits[kLogits];
        float output[64];
        uint32_t weights[kLogits / 2];

        auto release = [&](uint32_t barrier, int arrivals) {
            __syncwarp();
            if (lane < arrivals) barrier_arrive(barrier);
        };
#if HOLD
        uint32_t held[kHeadDim / 4];
#else
        uint32_t q_descriptor;
#endif
        auto issue_qk = [&] {
            const uint32_t k_descriptor = descriptor(shared.k + k_ring.index * kTileBytes, 0);
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                // 16 columns are 32 bytes; after 64 columns comes the other half.
                const uint32_t half = i / 4, bytes = i % 4 * 32;
                const uint32_t keys = k_descriptor + ((half * kHalfTile + bytes) >> 4);
#if HOLD
                product_qk(logits, held + 4 * i, keys, i > 0);
#else
                product_qk(logits, q_descriptor + ((half * kHalfQ + bytes) >> 4), keys, i > 0);
#endif
            }
            products_commit();
        };
        auto issue_pv = [&] {
            const uint32_t v_descriptor = descriptor(shared.v + v_ring.index * kTileBytes, kHalfTile);
#pragma unroll
            for (int i = 0; i < K_TILE / 16; ++i)
                product_pv(output, weights + 4 * i, v_descriptor + (i * 16 * kRowBytes >> 4));
            products_commit();
        };
        auto pack_weights = [&] {
#pragma unroll
            for (int i = 0; i < kLogits / 2; ++i) weights[i] = pack(logits[2 * i], logits[2 * i + 1]);
        };

        Item item(block, blocks, 0, items);
        int count = item.valid ? counts[item.row] : 0;
        for (int turn = 0; item.valid; ++turn) {
            const int units = count << shift;
            const Item next(block, blocks, turn + 1, items);
            count = next.valid ? counts[next.row] : 0;
            const int steps = (units + kUnits - 1) / kUnits;
            const bool shares = item.half >= 0;
            const int first = shares ? consumer : 0, every = shares ? 2 : 1;
            const int rows = (shares ? item.half : consumer) * 64;
            const uint32_t queries = shared.q + q_ring.index * kQBytes;
#if !HOLD
            q_descriptor = descriptor(queries + rows * kRowBytes, 0);
#endif
            // Where they share the steps, one consumer gives a step back for both.
            const int arrivals = shares ? 2 : 1;
            k_ring.advance(first);
            v_ring.advance(first);

            // Rows of a thread: lane / 4 and that plus 8 of its warp's 16; of 8 columns two, from 2 * (lane % 4) on.
            float best[2] = {-kInfinity, -kInfinity};
            float norm[2] = {0.0f, 0.0f};
            float decay[2];
            // Logits to weights; the sums over the four threads of a row wait for the end.
            auto softmax = [&] {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float tops[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) tops[i] = fmaxf(logits[4 * i + 2 * r], logits[4 * i + 2 * r + 1]);
#pragma unroll
                    for (int i = 4; i < kLogits / 4; ++i) {
                        tops[i % 4] = fmaxf(tops[i % 4], logits[4 * i + 2 * r]);
                        tops[i % 4] = fmaxf(tops[i % 4], logits[4 * i + 2 * r + 1]);
                    }
                    float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * to_log2;
#if LAZY
                    const float now = top > best[r] + kSlack ? top : best[r];
#else
                    const float now = fmaxf(best[r], top);
#endif
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
            barrier_wait(shared.full_q + 8 * q_ring.index, q_ring.parity);
#if HOLD
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                const int row = rows + warp * 16 + lane % 16;
                load_matrices(held + 4 * i, queries + place(row, 2 * i + lane / 16, kHalfQ));
            }
#endif
            if (first < steps) {
                barrier_wait(shared.full_k + 8 * k_ring.index, k_ring.parity);
                fence_for_products();
                pin(logits);
                products_begin();
                issue_qk();
                products_wait<0>();
                pin(logits);
                release(shared.empty_k + 8 * k_ring.index, arrivals);
                k_ring.advance(every);
                if (first == 0 && units % kUnits) {
                    // The first unit is there twice.
#pragma unroll
                    for (int i = 0; i < kLogits / 2; ++i) logits[i] = -kInfinity;
                }
                softmax();
                pack_weights();
                for (int step = first + every; step < steps; step += every) {
                    barrier_wait(shared.full_k + 8 * k_ring.index, k_ring.parity);
                    barrier_wait(shared.full_v + 8 * v_ring.index, v_ring.parity);
                    fence_for_products();
                    if (TURNS && !shares) named_sync(kMine + consumer, kTurnThreads);
                    pin(logits);
                    pin(output);
                    products_begin();
                    issue_qk();
                    issue_pv();
                    if (TURNS && !shares) named_arrive(kMine + 1 - consumer, kTurnThreads);
                    products_wait<1>();
                    pin(logits);
                    release(shared.empty_k + 8 * k_ring.index, arrivals);
                    k_ring.advance(every);
                    softmax();
                    pin(logits);
                    finish_before_waiting(norm[0] + norm[1], shared.q);
                    products_wait<0>();
                    pin(output);
                    release(shared.empty_v + 8 * v_ring.index, arrivals);
                    v_ring.advance(every);
                    pack_weights();
                    if (!LAZY || __any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
                        for (int i = 0; i < 64; ++i) output[i] *= decay[i / 2 % 2];
                    }
                }
                barrier_wait(shared.full_v + 8 * v_ring.index, v_ring.parity);
                fence_for_products();
                pin(output);
                products_begin();
                issue_pv();
                products_wait<0>();
                pin(output);
                release(shared.empty_v + 8 * v_ring.index, arrivals);
                v_ring.advance(every);
            }

#pragma unroll
            for (int r = 0; r < 2; ++r) {
                norm[r] += __shfl_xor_sync(~0u, norm[r], 1);
                norm[r] += __shfl_xor_sync(~0u, norm[r], 2);
            }
            if (shares) {
                // The second consumer's part goes through shared memory, of which nobody needs anything any more: this
                // is the block's last item.
                const uint32_t part = queries + thread * 4, sums = shared.k + thread * 4;
                constexpr int kColumn = kGroup * 4;
                named_sync(5, 2 * kGroup);
                if (consumer == 1) {
#pragma unroll
                    for (int i = 0; i < 64; ++i) store_shared(part + i * kColumn, __float_as_uint(output[i]));
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        store_shared(sums + r * kColumn, __float_as_uint(best[r]));
                        store_shared(sums + (2 + r) * kColumn, __float_as_uint(norm[r]));
                    }
                }
                named_sync(5, 2 * kGroup);
                if (consumer == 1) break;
                float mine[2], theirs[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float their_best = __uint_as_float(load_shared4(sums + r * kColumn));
                    const float top = fmaxf(best[r], their_best);
                    mine[r] = norm[r] > 0.0f ? exp2_fast(best[r] - top) : 0.0f;
                    theirs[r] = their_best > -kInfinity ? exp2_fast(their_best - top) : 0.0f;
                    norm[r] = norm[r] * mine[r] + __uint_as_float(load_shared4(sums + (2 + r) * kColumn)) * theirs[r];
                }
#pragma unroll
                for (int i = 0; i < 64; ++i) {
                    const float other = __uint_as_float(load_shared4(part + i * kColumn));
                    output[i] = output[i] * mine[i / 2 % 2] + other * theirs[i / 2 % 2];
                }
            }

            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) inverse[r] = norm[r] > 0.0f ? 1.0f / norm[r] : 0.0f;
            // Through the place of these queries, so that whole rows are written. All warps must be done with them.
            named_sync(3 + consumer, kGroup);
            const uint32_t stage = queries + rows * kRowBytes;
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
                query_token(item.row % query_blocks, q_blocks, frame_tokens) + rows + thread / 16;
            uint16_t* target =
                out + static_cast<uint64_t>(token) * stride + static_cast<uint64_t>(head) * kHeadDim + thread % 16 * 8;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t from = stage + place(thread / 16 + 8 * i, thread % 16, kHalfQ);
                store_global(target + static_cast<uint64_t>(i) * 8 * stride, load_shared(from));
            }
            release(shared.empty_q + 8 * q_ring.index, 1);
            q_ring.advance();
            item = next;
        }
    }
}
