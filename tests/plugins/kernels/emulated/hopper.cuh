// An emulation of plugins/kernels/hopper.cuh on a CPU: one thread of the machine for each thread of a block.
//
// As late as Hopper may be: copies happen when their barrier is told of them, products a while after they are waited for,
// with what shared memory and registers hold then. A kernel that reads results too early, or gives a buffer back too
// early, is wrong here too. Layouts of operands and descriptors after the PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions".
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct alignas(16) Bytes16 {
    uint32_t x, y, z, w;
};
struct Index {
    unsigned x, y;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

// Shared memory starts at an address that is no multiple of 1024.
constexpr uint32_t kSharedStart = 1040;
extern uint8_t dynamic[];

struct Barrier {
    std::mutex mutex;
    std::condition_variable changed;
    int count = 0, left = 0;
    uint32_t phase = 0;
};
struct Named {
    std::mutex mutex;
    std::condition_variable changed;
    int arrived = 0;
    uint64_t generation = 0;
};
struct Warp {
    std::barrier<> all{32};
    uint64_t values[32][4];
};
// What the threads of a block share.
struct Block {
    std::map<uint32_t, Barrier> barriers;  // filled by one thread before the others look
    Named named[16];
    std::barrier<> everyone;
    Warp warps[16];
    explicit Block(unsigned threads) : everyone(threads) {}
};
inline std::unique_ptr<Block> block;
inline thread_local std::vector<std::function<void()>> copies, issued;
inline thread_local std::deque<std::vector<std::function<void()>>> groups;

inline Warp& warp_here() { return block->warps[threadIdx.x / 32]; }
inline uint8_t* at(uint32_t address) { return dynamic + (address - kSharedStart); }
inline uint32_t shared_address(const void* pointer) {
    return kSharedStart + static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - dynamic);
}

inline void __syncthreads() { block->everyone.arrive_and_wait(); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void __syncwarp() { warp_here().all.arrive_and_wait(); }

template <class T>
T exchange(T value, int from) {
    Warp& warp = warp_here();
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    warp.values[threadIdx.x % 32][0] = bits;
    warp.all.arrive_and_wait();
    bits = warp.values[from][0];
    warp.all.arrive_and_wait();
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return exchange(value, from % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange(value, threadIdx.x % 32 ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool value) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(exchange<int>(value, lane)) << lane;
    return all;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ldg(const int* pointer) { return *pointer; }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
using std::fma;
using std::fmax;
using std::min;

inline void barrier_init(uint32_t barrier, int count) {
    Barrier& here = block->barriers[barrier];
    here.count = here.left = count;
}
inline void barriers_ready() {}
inline void barrier_arrive(uint32_t barrier) {
    Barrier& here = block->barriers.at(barrier);
    std::lock_guard lock(here.mutex);
    if (--here.left == 0) {
        here.left = here.count;
        here.phase ^= 1;
        here.changed.notify_all();
    }
}
inline void copies_wait() {
    for (auto& copy : copies) copy();
    copies.clear();
}
inline void barrier_arrive_after_copies(uint32_t barrier) {
    copies_wait();
    barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    Barrier& here = block->barriers.at(barrier);
    std::unique_lock lock(here.mutex);
    here.changed.wait(lock, [&] { return here.phase != parity; });
}
// Whether this was the last of `threads`, who lets the others go.
inline bool count_named(Named& here, int threads) {
    if (++here.arrived < threads) return false;
    here.arrived = 0;
    ++here.generation;
    here.changed.notify_all();
    return true;
}
inline void named_sync(int name, int threads) {
    Named& here = block->named[name];
    std::unique_lock lock(here.mutex);
    const uint64_t generation = here.generation;
    if (count_named(here, threads)) return;
    here.changed.wait(lock, [&] { return here.generation != generation; });
}
inline void named_arrive(int name, int threads) {
    Named& here = block->named[name];
    std::lock_guard lock(here.mutex);
    count_named(here, threads);
}
inline void copy16(uint32_t to, const void* from) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    copies.push_back([=] { std::memcpy(at(to), from, 16); });
}
inline void store_shared(uint32_t to, uint32_t value) { std::memcpy(at(to), &value, 4); }
inline Bytes16 load_shared(uint32_t from) {
    Bytes16 bytes;
    std::memcpy(&bytes, at(from), 16);
    return bytes;
}
inline void store_global(void* to, Bytes16 bytes) { std::memcpy(to, &bytes, 16); }

inline void fence_for_products() {}
inline void products_begin() {}
inline void finish_before_waiting(float, uint32_t) {}
template <int N>
void pin(float (&)[N]) {}
template <int N>
void registers_give() {}
template <int N>
void registers_take() {}
inline float exp2_fast(float x) { return std::exp2(x); }

#if HALF
#error "only bfloat16 is emulated"
#endif
inline float to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
inline uint32_t to_bits(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline void unpack(uint32_t pair, float* to) {
    to[0] = to_float(pair & 0xFFFF);
    to[1] = to_float(pair >> 16);
}
inline void unpack(Bytes16 bytes, float* to) {
    unpack(bytes.x, to);
    unpack(bytes.y, to + 2);
    unpack(bytes.z, to + 4);
    unpack(bytes.w, to + 6);
}
inline uint32_t pack(float low, float high) { return to_bits(high) << 16 | to_bits(low); }

inline void products_commit() {
    groups.push_back(std::move(issued));
    issued.clear();
}
template <int Left>
void products_wait() {
    // Long enough for a buffer that was given back too early to be filled anew.
    if (groups.size() > Left) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    while (groups.size() > Left) {
        for (auto& product : groups.front()) product();
        groups.pop_front();
    }
}

// Element of an operand in shared memory with 128-byte swizzle. `along`: index along the 64 elements of a row, which go on
// `leading` bytes further; `across`: row.
inline float element(uint64_t descriptor, int along, int across) {
    if (descriptor >> 62 != 1) std::abort();
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
    uint32_t address = start + along / 64 * leading + along % 64 * 2 + across / 8 * eight_rows + across % 8 * 128;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, at(address), 2);
    return to_float(bits);
}

// Row and column of element `i` of a thread's part of a 64-row result.
inline int result_row(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
inline int result_column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

template <int N>
void product_qk(float (&d)[N], uint64_t a, uint64_t b, int add) {
    issued.push_back([=, &d] {
        for (int i = 0; i < N; ++i) {
            float sum = add ? d[i] : 0.0f;
            for (int j = 0; j < 16; ++j) sum += element(a, j, result_row(i)) * element(b, j, result_column(i));
            d[i] = sum;
        }
    });
}

inline void product_pv(float (&d)[64], const uint32_t* a, uint64_t b) {
    issued.push_back([=, &d] {
        Warp& warp = warp_here();
        for (int i = 0; i < 4; ++i) warp.values[threadIdx.x % 32][i] = a[i];
        warp.all.arrive_and_wait();
        for (int i = 0; i < 64; ++i) {
            float sum = d[i];
            for (int j = 0; j < 16; ++j) {
                // Four threads hold a row: two neighbours each, of columns 0-7 in parts 0 and 1, of 8-15 in 2 and 3.
                const int lane = threadIdx.x % 32 / 4 * 4 + j % 8 / 2;
                const uint64_t pair = warp.values[lane][j / 8 * 2 + i / 2 % 2];
                sum += to_float(pair >> 16 * (j % 2) & 0xFFFF) * element(b, result_column(i), j);
            }
            d[i] = sum;
        }
        warp.all.arrive_and_wait();
    });
}

template <class Kernel>
void launch(unsigned grid_x, unsigned grid_y, unsigned block_threads, uint32_t shared_bytes, Kernel kernel) {
    for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned x = 0; x < grid_x; ++x) {
            block = std::make_unique<Block>(block_threads);
            std::memset(dynamic, 0xFF, shared_bytes);  // not numbers
            std::vector<std::thread> threads;
            for (unsigned i = 0; i < block_threads; ++i) {
                threads.emplace_back([=] {
                    threadIdx = {i, 0};
                    blockIdx = {x, y};
                    gridDim = {grid_x, grid_y};
                    kernel();
                });
            }
            for (auto& thread : threads) thread.join();
        }
    }
}
