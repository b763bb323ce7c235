// Small kernels that keep the emulator honest: right as they stand, and wrong in one way for each `bug`.
#include "launch.h"

using namespace fuseline;

namespace {

enum Bug {
    kNone,
    kMissingWait,
    kWrongParity,
    kNoEmptyWait,
    kTooFewBytesExpected,
    kTooManyBytesExpected,
    kOddSize,
    kMissingProxyFence,
    kMissingClusterBarrier,
    kOneSlot,
    kEarlyExit,
    kMissingSync,
    kOutOfBounds,
    kUnwritten,
    kMissingRelease,
    kMissingGlobalFence,
    kDivergedWarp,
    kMissingArrival,
    kWriteReadOnly,
    kNoGridWait,
};

struct Args {
    int bug;
    int rounds;
    const float* in;
    float* out;
    uint32_t* words;
};

constexpr uint32_t kTile = 256; // floats
constexpr uint32_t kBytes = 4 * kTile;

// Warp 0 streams tiles through two slots of shared memory; warps 1 and 2 add them up.
__global__ void stream(Args args) {
    FL_DYNAMIC_SHARED(smem);
    const float* slots = reinterpret_cast<const float*>(smem + 64);
    const uint32_t full = ptx::shared_address(smem), empty = full + 16;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < 2; ++slot) {
            ptx::mbarrier_init(full + 8 * slot, 1);
            ptx::mbarrier_init(empty + 8 * slot, 64);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (warp == 0) {
        for (int round = 0; lane == 0 && round < args.rounds; ++round) {
            const uint32_t slot = round % 2;
            if (round >= 2 && args.bug != kNoEmptyWait) {
                ptx::mbarrier_wait(empty + 8 * slot, (round / 2 - 1) % 2);
            }
            const uint32_t expected = args.bug == kTooFewBytesExpected && round == 1    ? kBytes - 16
                                      : args.bug == kTooManyBytesExpected && round == 1 ? kBytes + 16
                                                                                        : kBytes;
            ptx::mbarrier_arrive_expect_tx(full + 8 * slot, expected);
            ptx::bulk_load(full + 64 + slot * kBytes, args.in + round * kTile, args.bug == kOddSize ? 1000 : kBytes,
                           full + 8 * slot);
        }
        return;
    }
    const uint32_t thread = threadIdx.x - 32;
    float sum[4] = {};
    for (int round = 0; round < args.rounds; ++round) {
        const uint32_t slot = round % 2;
        if (args.bug != kMissingWait || round != 2) {
            const uint32_t parity = round / 2 % 2;
            ptx::mbarrier_wait(full + 8 * slot, args.bug == kWrongParity && round == 3 ? parity ^ 1 : parity);
        }
        for (int i = 0; i < 4; ++i) {
            sum[i] += slots[slot * kTile + 64 * i + thread];
        }
        if (args.bug != kMissingArrival || thread != 5) {
            ptx::mbarrier_arrive(empty + 8 * slot);
        }
    }
    for (int i = 0; i < 4; ++i) {
        args.out[64 * i + thread] = sum[i];
    }
}

// Each round, every CTA of a cluster sends its 64 floats to the next; after as many rounds as CTAs, all are home again.
__global__ void pass_around(Args args) {
    FL_DYNAMIC_SHARED(smem);
    float* mine = reinterpret_cast<float*>(smem + 64);
    const float* slots = reinterpret_cast<const float*>(smem + 64 + 256);
    const uint32_t full = ptx::shared_address(smem), slot_address = ptx::shared_address(slots);
    const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size(), next = (rank + 1) % size;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(full + 8, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (args.bug != kMissingClusterBarrier) {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
    mine[threadIdx.x] = args.in[64 * blockIdx.x + threadIdx.x];
    for (int round = 0; round < args.rounds; ++round) {
        const uint32_t slot = args.bug == kOneSlot ? 0 : round % 2, barrier = full + 8 * slot;
        const uint32_t parity = args.bug == kOneSlot ? round % 2 : round / 2 % 2;
        if (args.bug != kMissingProxyFence) {
            ptx::fence_proxy_async();
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(barrier, 256);
            ptx::bulk_send(ptx::map_to_rank(slot_address + 256 * slot, next), ptx::shared_address(mine), 256,
                           ptx::map_to_rank(barrier, next));
        }
        if (args.bug == kEarlyExit && round + 1 == args.rounds) {
            return;
        }
        ptx::mbarrier_wait(barrier, parity);
        const float received = slots[64 * slot + threadIdx.x];
        ptx::cluster_arrive(); // the peer has read this CTA's floats once its own wait is over
        ptx::cluster_wait();
        mine[threadIdx.x] = received;
    }
    args.out[64 * blockIdx.x + threadIdx.x] = mine[threadIdx.x];
}

// One slot per CTA, without the barrier that keeps a fast peer from writing the next round over it.
__global__ void push(Args args) {
    FL_DYNAMIC_SHARED(smem);
    const float* slots = reinterpret_cast<const float*>(smem + 64);
    const uint32_t full = ptx::shared_address(smem), slot_address = ptx::shared_address(slots);
    const uint32_t next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
    const uint32_t num_slots = args.bug == kOneSlot ? 1 : args.rounds;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < num_slots; ++slot) {
            ptx::mbarrier_init(full + 8 * slot, 1);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
    float value = args.in[32 * blockIdx.x + threadIdx.x];
    for (int round = 0; round < args.rounds; ++round) {
        const uint32_t slot = round % num_slots, barrier = full + 8 * slot;
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(barrier, 128);
        }
        ptx::st_async(ptx::map_to_rank(slot_address + 128 * slot + 4 * threadIdx.x, next), value,
                      ptx::map_to_rank(barrier, next));
        ptx::mbarrier_wait(barrier, round / num_slots % 2);
        value = slots[32 * slot + threadIdx.x];
    }
    args.out[32 * blockIdx.x + threadIdx.x] = value;
}

// Shared memory reversed by a CTA; every CTA's sum through global memory to all.
__global__ void exchange(Args args) {
    FL_DYNAMIC_SHARED(smem);
    float* values = reinterpret_cast<float*>(smem);
    const uint32_t thread = threadIdx.x, last = blockDim.x - 1;
    if (args.bug != kUnwritten || thread != 7) {
        values[thread] = args.in[thread] * static_cast<float>(blockIdx.x + 1);
    }
    if (args.bug != kMissingSync) {
        __syncthreads();
    }
    float sum = values[args.bug == kOutOfBounds ? last - thread + 8 : last - thread];
    if (args.bug == kDivergedWarp && thread == 3) {
        __syncwarp();
    }
    for (int i = 16; i > 0; i /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, i);
    }
    float* sums = args.out + gridDim.x;
    if (thread == 0) {
        sums[blockIdx.x] = sum;
        if (args.bug == kWriteReadOnly) {
            const_cast<float*>(args.in)[0] = 0.0f;
        }
        if (args.bug != kMissingRelease) {
            const uint32_t add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
            ptx::wait_top_bit_change(args.words, ptx::fetch_add_acq_rel(args.words, add));
        }
        float total = 0.0f;
        for (uint32_t i = 0; i < gridDim.x; ++i) {
            total += ptx::load_l2(sums + i);
        }
        args.out[blockIdx.x] = total;
    }
}

// CTA 0 writes, the others fetch it by a bulk copy.
__global__ void fetch(Args args) {
    FL_DYNAMIC_SHARED(smem);
    const uint32_t full = ptx::shared_address(smem);
    const float* fetched = reinterpret_cast<const float*>(smem + 16);
    float* shared_out = args.out + 32 * gridDim.x;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        shared_out[threadIdx.x] = args.in[threadIdx.x];
        if (args.bug != kMissingGlobalFence) {
            ptx::fence_proxy_async_global();
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::add_release(args.words, 1);
        }
    }
    if (threadIdx.x == 0) {
        ptx::wait_at_least(args.words, 1);
        ptx::fence_proxy_async_global();
        ptx::mbarrier_arrive_expect_tx(full, 128);
        ptx::bulk_load(full + 16, shared_out, 128, full);
    }
    ptx::mbarrier_wait(full, 0);
    args.out[32 * blockIdx.x + threadIdx.x] = fetched[threadIdx.x];
}

// Two of these in a row, the second launched early: it doubles what the first wrote.
__global__ void twice(Args args) {
    ptx::grid_launch_dependents();
    if (args.bug != kNoGridWait) {
        ptx::grid_wait();
    }
    float* value = args.out + 32 * blockIdx.x + threadIdx.x;
    *value = args.rounds == 0 ? args.in[threadIdx.x] : 2.0f * *value;
}

// out[16][8] = a[16][16] b[8][16]^T through ldmatrix and mma, from bf16 in `words`.
__global__ void multiply(Args args) {
    FL_DYNAMIC_SHARED(smem);
    uint32_t* words = reinterpret_cast<uint32_t*>(smem);
    const uint32_t lane = threadIdx.x;
    for (uint32_t i = lane; i < 24 * 8; i += 32) {
        words[i] = args.words[i];
    }
    __syncwarp();
    const uint32_t base = ptx::shared_address(smem);
    uint32_t a[4], b[2];
    float c[4] = {};
    ptx::ldmatrix_x4(a, base + lane % 16 * 32 + lane / 16 * 16);
    ptx::ldmatrix_x2(b, base + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
    ptx::mma_bf16(c, a, b);
    for (int i = 0; i < 4; ++i) {
        args.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
    }
}

} // namespace

extern "C" __attribute__((visibility("default"))) int fl_case(int which, int bug, int rounds, int cluster, float* in,
                                                              float* out, uint32_t* words) {
    const Args args{bug, rounds, in, out, words};
    const auto size = static_cast<uint32_t>(cluster);
    switch (which) {
    case 0:
        return launch("stream", stream, args, {1, 1, 96, 64 + 2 * kBytes, false, nullptr});
    case 1:
        return launch("pass_around", pass_around, args, {1, size, 64, 1024, false, nullptr});
    case 2:
        return launch("push", push, args, {2, size, 32, 2048, false, nullptr});
    case 3:
        return launch("exchange", exchange, args, {size, 1, 32, 128, false, nullptr});
    case 4:
        return launch("fetch", fetch, args, {size, 1, 32, 256, false, nullptr});
    case 5: {
        Args second = args;
        second.rounds = 1;
        const int error = launch("first", twice, args, {size, 1, 32, 0, false, nullptr});
        return error != 0 ? error : launch("second", twice, second, {size, 1, 32, 0, true, nullptr});
    }
    default:
        return launch("multiply", multiply, args, {1, 1, 32, 1024, false, nullptr});
    }
}
