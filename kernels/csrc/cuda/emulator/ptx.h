// The host's stand-in for CUDA and for ptx.cuh: kernels compiled with -DFUSELINE_EMULATE call these functions.
//
// Threads are fibers (machine.h), and every access of a kernel to memory is seen, because its sources are compiled with
// the instrumentation of -fsanitize=thread while the callbacks are the emulator's own (memory.cpp). What each function
// promises is said in ptx.cuh; here stands what is checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(n)
#define __grid_constant__
#define FL_PTX inline
#define FL_DYNAMIC_SHARED(name) unsigned char* name = ::fuseline::emulator::dynamic_shared()

#define threadIdx (::fuseline::emulator::thread_index())
#define blockIdx (::fuseline::emulator::block_index())
#define gridDim (::fuseline::emulator::grid_size())
#define blockDim (::fuseline::emulator::block_size())

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

namespace fuseline::emulator {

struct Index {
    unsigned x;
};
Index thread_index();
Index block_index();
Index grid_size();
Index block_size();
unsigned char* dynamic_shared();

void sync_threads();
void sync_warp(uint32_t mask);
uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane);
uint32_t ballot(uint32_t mask, bool predicate);

template <class T>
T shuffle_any(uint32_t mask, T value, int source_lane) {
    static_assert(sizeof(T) == 4, "shuffles are emulated for 32-bit values");
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = shuffle(mask, bits, source_lane);
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int lane() {
    return static_cast<int>(thread_index().x % 32);
}

} // namespace fuseline::emulator

inline void __syncthreads() {
    fuseline::emulator::sync_threads();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    fuseline::emulator::sync_warp(mask);
}
inline unsigned __ballot_sync(unsigned mask, bool p) {
    return fuseline::emulator::ballot(mask, p);
}
inline bool __any_sync(unsigned mask, bool p) {
    return fuseline::emulator::ballot(mask, p) != 0;
}
inline bool __all_sync(unsigned mask, bool p) {
    return fuseline::emulator::ballot(mask, p) == 0xffffffffu;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane) {
    return fuseline::emulator::shuffle_any(mask, value, source_lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    return fuseline::emulator::shuffle_any(mask, value, fuseline::emulator::lane() ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
    const int from = fuseline::emulator::lane() + delta;
    return fuseline::emulator::shuffle_any(mask, value, from < 32 ? from : fuseline::emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
    const int from = fuseline::emulator::lane() - delta;
    return fuseline::emulator::shuffle_any(mask, value, from >= 0 ? from : fuseline::emulator::lane());
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline float fmaxf(float a, float b) {
    return std::fmax(a, b);
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}

namespace fuseline::ptx {

// Shared addresses are offsets plus kSharedBase; a peer's carry its rank + 1 above bit 24.
uint32_t shared_address(const void* pointer);
uint32_t map_to_rank(uint32_t shared, uint32_t rank);
uint32_t cluster_rank();
uint32_t cluster_size();

// Refused: a barrier not initialised, or not known to be by this thread; more arrivals than expected; unaligned ones.
void mbarrier_init(uint32_t shared, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t shared);
void mbarrier_arrive_expect_tx(uint32_t shared, uint32_t bytes);
bool mbarrier_try_wait(uint32_t shared, uint32_t parity);
void mbarrier_wait(uint32_t shared, uint32_t parity);

// Land whole, at a random later time. Refused: sizes and addresses that are not multiples of 16, what is outside shared
// memory or a registered buffer, a source or target that generic stores wrote and no fence_proxy_async followed.
void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
void bulk_send(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_barrier);
void bulk_prefetch_l2(const void* global, uint32_t bytes);
inline uint64_t evict_first_policy() {
    return 0;
}
inline void bulk_load_hint(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t) {
    bulk_load(shared, global, bytes, barrier);
}

void store_async(uint32_t remote, const void* value, uint32_t bytes, uint32_t remote_barrier);
inline void st_async(uint32_t remote, float value, uint32_t barrier) {
    store_async(remote, &value, 4, barrier);
}
inline void st_async(uint32_t remote, float2 value, uint32_t barrier) {
    store_async(remote, &value, 8, barrier);
}
inline void st_async(uint32_t remote, float4 value, uint32_t barrier) {
    store_async(remote, &value, 16, barrier);
}
inline void st_async(uint32_t remote, uint32_t value, uint32_t barrier) {
    store_async(remote, &value, 4, barrier);
}

void load_remote_bytes(uint32_t remote, void* value, uint32_t bytes);
inline uint32_t load_remote(uint32_t remote) {
    uint32_t value;
    load_remote_bytes(remote, &value, 4);
    return value;
}
inline float4 load_remote_vector(uint32_t remote) {
    float4 value;
    load_remote_bytes(remote, &value, 16);
    return value;
}

void fence_proxy_async();
void fence_proxy_async_global();
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();
void named_barrier_sync(uint32_t barrier, uint32_t threads);
void named_barrier_arrive(uint32_t barrier, uint32_t threads);

uint32_t load_acquire(const uint32_t* global);
void store_release(uint32_t* global, uint32_t value);
void add_release(uint32_t* global, uint32_t value);
uint32_t fetch_add_acq_rel(uint32_t* global, uint32_t value);
void wait_at_least(const uint32_t* global, uint32_t value);
void wait_top_bit_change(const uint32_t* global, uint32_t before);
void atomic_add_floats(float* global, const float* values, int count);
inline void atomic_add(float* global, float4 value) {
    atomic_add_floats(global, &value.x, 4);
}
inline void atomic_add(float* global, float2 value) {
    atomic_add_floats(global, &value.x, 2);
}
inline float4 load_l2(const float4* global) {
    return *global;
}
inline float2 load_l2(const float2* global) {
    return *global;
}
inline uint2 load_l2(const uint2* global) {
    return *global;
}
inline uint4 load_l2(const uint4* global) {
    return *global;
}
inline float load_l2(const float* global) {
    return *global;
}
inline void prefetch_l2(const void*) {}

void grid_wait();
void grid_launch_dependents();

// All lanes of a warp together.
void ldmatrix(uint32_t* r, uint32_t shared, int matrices, bool transposed);
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    ldmatrix(r, shared, 4, false);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t shared) {
    ldmatrix(r, shared, 2, false);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
    ldmatrix(r, shared, 4, true);
}
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t shared) {
    ldmatrix(r, shared, 2, true);
}
inline uint32_t transpose_8x8(uint32_t elements) {
    const int lane = emulator::lane(), row = lane / 4, column = lane % 4;
    const uint32_t first = __shfl_sync(0xffffffffu, elements, 8 * column + row / 2);
    const uint32_t second = __shfl_sync(0xffffffffu, elements, 8 * column + 4 + row / 2);
    return row % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
}
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float bf16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint32_t pack_bf16x2(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline float bf16_low(uint32_t packed) {
    return __uint_as_float(packed << 16);
}
inline float bf16_high(uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);
}
inline float exp2_approx(float x) {
    return std::exp2(x);
}
inline uint32_t recomputed(uint32_t value) {
    return value;
}
uint64_t clock_ticks();

} // namespace fuseline::ptx
