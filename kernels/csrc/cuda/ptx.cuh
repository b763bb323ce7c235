// Every PTX instruction the kernels use, as a small function; kernels contain no asm.
//
// Addresses named `shared` are 32-bit addresses of this CTA's shared memory (shared_address); those named `remote` are
// addresses in the cluster's window (map_to_rank), where an own address means the own CTA. The host emulator has the
// same functions in emulator/ptx.h: a function added here is added there, with its checks.
#pragma once

#ifdef FUSELINE_EMULATE
#include "emulator/ptx.h"
#else

#include <cstdint>
#include <cuda_runtime.h>

#define FL_PTX __device__ __forceinline__
// The kernel's dynamic shared memory; kernels have no other.
#define FL_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace fuseline::ptx {

// ---- addresses and ranks -------------------------------------------------------------------------------------------

FL_PTX uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The address in CTA `rank` of the cluster of what `shared` is here.
FL_PTX uint32_t map_to_rank(uint32_t shared, uint32_t rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

FL_PTX uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

FL_PTX uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and every expected byte has come; the first has parity 0.

// One thread; then fence_mbarrier_init and a barrier before anyone else uses it.
FL_PTX void mbarrier_init(uint32_t shared, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared), "r"(arrivals) : "memory");
}

FL_PTX void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FL_PTX void mbarrier_arrive(uint32_t shared) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared) : "memory");
}

FL_PTX void mbarrier_arrive_expect_tx(uint32_t shared, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared), "r"(bytes) : "memory");
}

FL_PTX bool mbarrier_try_wait(uint32_t shared, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared), "r"(parity)
                 : "memory");
    return done != 0;
}

// Until the phase of this parity has ended. What the phase's arrivals and copies wrote, from peers too, is then
// visible.
FL_PTX void mbarrier_wait(uint32_t shared, uint32_t parity) {
    asm volatile("{\n.reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;\n}" ::"r"(shared),
                 "r"(parity)
                 : "memory");
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------
// All sizes and addresses of bulk copies are multiples of 16 bytes.

FL_PTX void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
        : "memory");
}

FL_PTX void bulk_load_hint(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// For bytes read once per step, such as weights: they leave L2 first.
FL_PTX uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// This CTA's shared memory into a peer's; completes `remote_barrier`, in the CTA that receives. What generic stores
// wrote to the source needs fence_proxy_async in the writing threads first.
FL_PTX void bulk_send(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(remote),
        "r"(shared), "r"(bytes), "r"(remote_barrier)
        : "memory");
}

// Starts bringing global memory into L2; bytes is a multiple of 16.
FL_PTX void bulk_prefetch_l2(const void* global, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

// Stores to a peer that complete as many bytes on its barrier, in the same CTA as `remote`.
FL_PTX void st_async(uint32_t remote, float value, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(value),
                 "r"(remote_barrier)
                 : "memory");
}

FL_PTX void st_async(uint32_t remote, float2 value, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(remote),
                 "f"(value.x), "f"(value.y), "r"(remote_barrier)
                 : "memory");
}

FL_PTX void st_async(uint32_t remote, float4 value, uint32_t remote_barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_barrier)
        : "memory");
}

FL_PTX void st_async(uint32_t remote, uint32_t value, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote), "r"(value),
                 "r"(remote_barrier)
                 : "memory");
}

// Ordinary loads from a peer, which wait for its answer; behind a cluster barrier.
FL_PTX uint32_t load_remote(uint32_t remote) {
    uint32_t value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
    return value;
}

FL_PTX float4 load_remote_vector(uint32_t remote) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(remote)
                 : "memory");
    return v;
}

// ---- fences and barriers -------------------------------------------------------------------------------------------

// This thread's stores to shared memory, before asynchronous copies that others start after a barrier.
FL_PTX void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for stores to global memory, and once more after acquiring them, before bulk_load reads them.
FL_PTX void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Compiles to a GPU-scope fence: only at a kernel's start or end.
FL_PTX void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Orders no memory, but mbarrier initialisation behind fence_mbarrier_init.
FL_PTX void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

FL_PTX void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// `threads`, a multiple of 32, take part; barrier 0 is __syncthreads'.
FL_PTX void named_barrier_sync(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

FL_PTX void named_barrier_arrive(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- between CTAs through global memory ----------------------------------------------------------------------------

FL_PTX uint32_t load_acquire(const uint32_t* global) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return value;
}

FL_PTX void store_release(uint32_t* global, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(value) : "memory");
}

FL_PTX void add_release(uint32_t* global, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(value)
                 : "memory");
}

// Adds and returns what was there; releases this thread's writes and acquires those of earlier adders.
FL_PTX uint32_t fetch_add_acq_rel(uint32_t* global, uint32_t value) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(global)), "r"(value)
                 : "memory");
    return before;
}

// Until the counter has come to `value`; counters only grow and may wrap around.
FL_PTX void wait_at_least(const uint32_t* global, uint32_t value) {
    while (static_cast<int32_t>(load_acquire(global) - value) < 0) {
    }
}

// Until bit 31 of the counter differs from that of `before`.
FL_PTX void wait_top_bit_change(const uint32_t* global, uint32_t before) {
    while (((load_acquire(global) ^ before) & 0x80000000u) == 0) {
    }
}

FL_PTX void atomic_add(float* global, float4 value) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "f"(value.x),
                 "f"(value.y), "f"(value.z), "f"(value.w)
                 : "memory");
}

FL_PTX void atomic_add(float* global, float2 value) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)), "f"(value.x),
                 "f"(value.y)
                 : "memory");
}

// Loads past L1, for what another CTA of this grid wrote (behind load_acquire).
FL_PTX float4 load_l2(const float4* global) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return v;
}

FL_PTX float2 load_l2(const float2* global) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return v;
}

FL_PTX float load_l2(const float* global) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(__cvta_generic_to_global(global)) : "memory");
    return v;
}

FL_PTX uint2 load_l2(const uint2* global) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return v;
}

FL_PTX uint4 load_l2(const uint4* global) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return v;
}

FL_PTX void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

// ---- programmatic dependent launch ---------------------------------------------------------------------------------

// Until the kernels before this one are complete and their writes visible.
FL_PTX void grid_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel start once every CTA of this one has said so or ended.
FL_PTX void grid_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- matrices ------------------------------------------------------------------------------------------------------
// 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8; afterwards lane i holds
// elements 2 * (i % 4) and the next of row i / 4 of each (of column i / 4 with _transposed).

FL_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

FL_PTX void ldmatrix_x2(uint32_t (&r)[2], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared)
                 : "memory");
}

FL_PTX void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

FL_PTX void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared)
                 : "memory");
}

// An 8x8 matrix of 16-bit elements, lane 4 * row + column / 2 holding two of a row: the lane's part of its transpose.
FL_PTX uint32_t transpose_8x8(uint32_t elements) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(elements));
    return transposed;
}

// c[16][8] += a[16][16] b[16][8]. With g = lane / 4 and t = lane % 4: a = rows g, g+8 at k = 2t, then at 2t+8; b = k 2t
// and 2t+8 of column g; c = row g at columns 2t, 2t+1, then row g+8.
FL_PTX void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// Rounded to nearest even; `low` in the lower half, which is the first in memory.
FL_PTX uint32_t pack_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

FL_PTX float bf16_low(uint32_t packed) {
    return __uint_as_float(packed << 16);
}
FL_PTX float bf16_high(uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);
}
FL_PTX float bf16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
FL_PTX uint16_t float_to_bf16(float value) {
    return static_cast<uint16_t>(pack_bf16x2(value, 0.0f));
}

FL_PTX float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same value, computed anew as far as the compiler knows: cheaper than to keep what follows from it in registers.
FL_PTX uint32_t recomputed(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

FL_PTX uint64_t clock_ticks() {
    uint64_t ticks;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(ticks)::"memory");
    return ticks;
}

} // namespace fuseline::ptx

#endif // FUSELINE_EMULATE
