// What the kernels use of Hopper, in PTX: barriers and asynchronous copies in shared memory, warpgroup products.
//
// Compiled with HALF: 1 for float16, 0 for bfloat16 operands. Kernels keep to these functions and have no PTX of their
// own, so that the tests can put an emulation of them in the place of this file.
#pragma once

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;

struct alignas(16) Bytes16 {
    uint32_t x, y, z, w;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once the asynchronous copies that this thread has issued are done.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void named_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// What the producer's copies wrote is read by the tensor cores through another proxy.
__device__ __forceinline__ void fence_for_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

template <int N>
__device__ __forceinline__ void pin(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Keeps the compiler from waiting for products before `sum` is known: it would move the wait in front of the arithmetic
// that is there to fill it. Sums of weights are never negative, so nothing is stored.
__device__ __forceinline__ void finish_before_waiting(float sum, uint32_t address) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never st.volatile.shared.f32 [%1], %0;\n}\n" ::"f"(sum),
        "r"(address)
        : "memory");
}

#if HALF
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif

#define R8(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3]), "+f"(a[i + 4]), "+f"(a[i + 5]), \
        "+f"(a[i + 6]), "+f"(a[i + 7])
#define R32(a) R8(a, 0), R8(a, 8), R8(a, 16), R8(a, 24)
#define R64(a) R32(a), R8(a, 32), R8(a, 40), R8(a, 48), R8(a, 56)
#define D32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
    "%28,%29,%30,%31"
#define D64 D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
    "%56,%57,%58,%59,%60,%61,%62,%63"

// logits (+)= queries (shared memory) x keys (shared memory), 16 columns of the head.
__device__ __forceinline__ void product_qk(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" D64 "}, %64, %65, add, 1, 1, 0, 0;\n}\n"
        : R64(d)
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void product_qk(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" D32 "}, %32, %33, add, 1, 1, 0, 0;\n}\n"
        : R32(d)
        : "l"(a), "l"(b), "r"(add));
}

// output += weights (registers) x values (shared memory), 16 keys.
__device__ __forceinline__ void product_pv(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" D64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
        : R64(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t pair;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ void unpack(uint32_t pair, float* to) {
#if HALF
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(to[0]), "=f"(to[1])
        : "r"(pair));
#else
    to[0] = __uint_as_float(pair << 16);
    to[1] = __uint_as_float(pair & 0xFFFF0000);
#endif
}

__device__ __forceinline__ void unpack(Bytes16 bytes, float* to) {
    unpack(bytes.x, to);
    unpack(bytes.y, to + 2);
    unpack(bytes.z, to + 4);
    unpack(bytes.w, to + 6);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int Registers>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Makes initialised barriers visible to copies.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ Bytes16 load_shared(uint32_t from) {
    Bytes16 bytes;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                 : "r"(from)
                 : "memory");
    return bytes;
}

__device__ __forceinline__ void store_global(void* to, Bytes16 bytes) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
                 "r"(bytes.w)
                 : "memory");
}
