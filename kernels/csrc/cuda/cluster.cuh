// Collectives among the CTAs of a cluster, through each other's shared memory.
//
// Payloads are fp32, sums go in rank order (so all CTAs have the same bits, always the same ones), and nothing fences
// beyond the cluster. Vectors lie in shared memory; thread i works on elements [4i, 4i + 4) and every 4 * threads on.
//
// One-shot: every CTA stores its vector straight into a slot of its own in each peer, by st.async, which completes an
// mbarrier there: one hop, (N - 1) vectors sent and received by each CTA. Two sets of slots, each with its mbarrier,
// take turns: a CTA comes to collective e + 2 only after every peer has sent in e + 1, which it did after reading its
// slots of e. Where vectors are long, scattering is less traffic: each CTA adds up one N-th and sends the sum to all,
// two hops and 2 (N - 1) / N vectors. Schedules and their proofs: collectives/on_chip.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace fuseline {

struct Sum {
    __device__ static float of(float a, float b) { return a + b; }
};
struct Max {
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ inline float4 combine(float4 a, float4 b) {
    return make_float4(Op::of(a.x, b.x), Op::of(a.y, b.y), Op::of(a.z, b.z), Op::of(a.w, b.w));
}

// Where a CTA is in its cluster, and how the threads of a CTA share a vector.
struct Place {
    uint32_t rank, cluster;

    __device__ static Place here(uint32_t cluster) { return {cluster == 1 ? 0 : ptx::cluster_rank(), cluster}; }
    __device__ uint32_t peer(uint32_t step) const { return (rank + step) % cluster; }
};

// Only by threads that have elements: peers cannot go on without those, so no such thread is ever two phases behind.
// One without could be, and would then wait for a phase that never ends.
__device__ inline void wait_for_own(uint32_t barrier, uint32_t parity, uint32_t vectors) {
    if (threadIdx.x < vectors) {
        ptx::mbarrier_wait(barrier, parity);
    }
}

// ---- one-shot ------------------------------------------------------------------------------------------------------

// All-reduce of vectors of `elements`, a multiple of 4.
template <class Op>
class ClusterReduce {
  public:
    // Of slots; all CTAs have them and the barriers at the same places. Barriers: two.
    __host__ __device__ static uint32_t bytes(uint32_t elements, uint32_t cluster) {
        return 2 * (cluster - 1) * elements * 4;
    }

    __device__ ClusterReduce(unsigned char* slots, uint64_t* barriers, uint32_t elements, Place place)
        : slots_(reinterpret_cast<float4*>(slots)), barriers_(ptx::shared_address(barriers)), vectors_(elements / 4),
          place_(place) {}

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const {
        ptx::mbarrier_init(barriers_, 1);
        ptx::mbarrier_init(barriers_ + 8, 1);
    }

    // data = the reduction over the cluster; every thread sees its own elements of it.
    __device__ void operator()(float4* data) {
        if (place_.cluster == 1) {
            return;
        }
        const uint32_t set = epoch_ % 2, barrier = barriers_ + 8 * set;
        float4* slots = slots_ + set * (place_.cluster - 1) * vectors_;
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(barrier, 16 * vectors_ * (place_.cluster - 1));
        }
        for (uint32_t i = threadIdx.x; i < vectors_; i += blockDim.x) {
            const float4 mine = data[i];
            for (uint32_t step = 1; step < place_.cluster; ++step) {
                const uint32_t peer = place_.peer(step), slot = slot_of(place_.rank, peer);
                ptx::st_async(ptx::map_to_rank(ptx::shared_address(slots + slot * vectors_ + i), peer), mine,
                              ptx::map_to_rank(barrier, peer));
            }
        }
        wait_for_own(barrier, epoch_ / 2 % 2, vectors_);
        for (uint32_t i = threadIdx.x; i < vectors_; i += blockDim.x) {
            float4 total = place_.rank == 0 ? data[i] : slots[i];
            for (uint32_t rank = 1; rank < place_.cluster; ++rank) {
                const bool own = rank == place_.rank;
                total = combine<Op>(total, own ? data[i] : slots[slot_of(rank, place_.rank) * vectors_ + i]);
            }
            data[i] = total;
        }
        ++epoch_;
    }

  private:
    // A CTA has no slot for itself.
    __device__ static uint32_t slot_of(uint32_t sender, uint32_t receiver) {
        return sender < receiver ? sender : sender - 1;
    }

    float4* slots_;
    uint32_t barriers_, vectors_;
    Place place_;
    uint32_t epoch_ = 0;
};

// All-gather of segments of `elements`, a multiple of 4.
class ClusterGather {
  public:
    // Of results; all CTAs have them and the barriers at the same places. Barriers: two.
    __host__ __device__ static uint32_t bytes(uint32_t elements, uint32_t cluster) {
        return 2 * cluster * elements * 4;
    }

    __device__ ClusterGather(unsigned char* results, uint64_t* barriers, uint32_t elements, Place place)
        : results_(reinterpret_cast<float4*>(results)), barriers_(ptx::shared_address(barriers)),
          vectors_(elements / 4), place_(place) {}

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const {
        ptx::mbarrier_init(barriers_, 1);
        ptx::mbarrier_init(barriers_ + 8, 1);
    }

    // The segments of all ranks, in order. Valid until the next call but one; between reading one result and the next
    // call lies a barrier of the CTA, without which a thread may miss a phase. A thread sees the own segment's elements
    // of others after a barrier only.
    __device__ const float4* operator()(const float4* segment) {
        const uint32_t set = epoch_ % 2, barrier = barriers_ + 8 * set;
        float4* result = results_ + set * place_.cluster * vectors_;
        if (threadIdx.x == 0 && place_.cluster > 1) {
            ptx::mbarrier_arrive_expect_tx(barrier, 16 * vectors_ * (place_.cluster - 1));
        }
        for (uint32_t i = threadIdx.x; i < vectors_; i += blockDim.x) {
            const float4 mine = segment[i];
            float4* target = result + place_.rank * vectors_ + i;
            *target = mine;
            for (uint32_t step = 1; step < place_.cluster; ++step) {
                const uint32_t peer = place_.peer(step);
                ptx::st_async(ptx::map_to_rank(ptx::shared_address(target), peer), mine,
                              ptx::map_to_rank(barrier, peer));
            }
        }
        if (place_.cluster > 1) {
            ptx::mbarrier_wait(barrier, epoch_ / 2 % 2);
        }
        ++epoch_;
        return result;
    }

  private:
    float4* results_;
    uint32_t barriers_, vectors_;
    Place place_;
    uint32_t epoch_ = 0;
};

// ---- scattering ----------------------------------------------------------------------------------------------------

// All-reduce in two hops; `elements` is a multiple of 4 * cluster. One set of slots and of results is enough: a CTA
// sends parts of e + 1 after it has everyone's sums of e, and sums of e + 1 after it has everyone's parts of it.
template <class Op>
class ClusterScatterReduce {
  public:
    // Of slots and results; all CTAs have them and the barriers at the same places. Barriers: two.
    __host__ __device__ static uint32_t bytes(uint32_t elements, uint32_t) { return 2 * elements * 4; }

    __device__ ClusterScatterReduce(unsigned char* slots, uint64_t* barriers, uint32_t elements, Place place)
        : slots_(reinterpret_cast<float4*>(slots)), sums_(slots_ + elements / 4),
          barriers_(ptx::shared_address(barriers)), part_(elements / 4 / place.cluster), place_(place) {}

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const {
        ptx::mbarrier_init(barriers_, 1);
        ptx::mbarrier_init(barriers_ + 8, 1);
    }

    // data = the reduction over the cluster, for all threads to see. Other threads' data may be read: a barrier of the
    // CTA lies before the call.
    __device__ void operator()(float4* data) {
        if (place_.cluster == 1) {
            return;
        }
        const uint32_t bytes = 16 * part_ * (place_.cluster - 1), parity = epoch_ % 2;
        const uint32_t own = place_.rank * part_;
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(barriers_, bytes);
            ptx::mbarrier_arrive_expect_tx(barriers_ + 8, bytes);
        }
        for (uint32_t step = 1; step < place_.cluster; ++step) {
            const uint32_t peer = place_.peer(step);
            send(data + peer * part_, slots_ + own, barriers_, peer);
        }
        ptx::mbarrier_wait(barriers_, parity);
        for (uint32_t i = threadIdx.x; i < part_; i += blockDim.x) {
            float4 total = place_.rank == 0 ? data[i] : slots_[i];
            for (uint32_t rank = 1; rank < place_.cluster; ++rank) {
                const bool mine = rank == place_.rank;
                total = combine<Op>(total, mine ? data[own + i] : slots_[rank * part_ + i]);
            }
            data[own + i] = total;
        }
        for (uint32_t step = 1; step < place_.cluster; ++step) {
            send(data + own, sums_ + own, barriers_ + 8, place_.peer(step));
        }
        ptx::mbarrier_wait(barriers_ + 8, parity);
        for (uint32_t i = threadIdx.x; i < part_ * place_.cluster; i += blockDim.x) {
            if (i - own >= part_) {
                data[i] = sums_[i];
            }
        }
        __syncthreads();
        ++epoch_;
    }

  private:
    __device__ void send(const float4* from, const float4* to, uint32_t barrier, uint32_t peer) const {
        for (uint32_t i = threadIdx.x; i < part_; i += blockDim.x) {
            ptx::st_async(ptx::map_to_rank(ptx::shared_address(to + i), peer), from[i],
                          ptx::map_to_rank(barrier, peer));
        }
    }

    float4 *slots_, *sums_;
    uint32_t barriers_, part_;
    Place place_;
    uint32_t epoch_ = 0;
};

// ---- the paper's form, to measure beside ---------------------------------------------------------------------------

// All-reduce in log2(N) hops: in each, pairs a stride apart exchange their running sums, lower rank first in the sum.
// A slot and a barrier a hop, in two sets.
template <class Op>
class ClusterReduceLog2 {
  public:
    __host__ __device__ static uint32_t hops(uint32_t cluster) {
        uint32_t count = 0;
        while (1u << count < cluster) {
            ++count;
        }
        return count;
    }
    // Of slots; all CTAs have them and the barriers at the same places. Barriers: two a hop, at most eight.
    __host__ __device__ static uint32_t bytes(uint32_t elements, uint32_t cluster) {
        return 2 * hops(cluster) * elements * 4;
    }

    __device__ ClusterReduceLog2(unsigned char* slots, uint64_t* barriers, uint32_t elements, Place place)
        : slots_(reinterpret_cast<float4*>(slots)), barriers_(ptx::shared_address(barriers)), vectors_(elements / 4),
          hops_(hops(place.cluster)), place_(place) {}

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const {
        for (uint32_t i = 0; i < 2 * hops_; ++i) {
            ptx::mbarrier_init(barriers_ + 8 * i, 1);
        }
    }

    // As ClusterReduce.
    __device__ void operator()(float4* data) {
        for (uint32_t hop = 0; hop < hops_; ++hop) {
            const uint32_t peer = place_.rank ^ 1u << hop, turn = hop + hops_ * (epoch_ % 2);
            const uint32_t barrier = barriers_ + 8 * turn;
            const float4* received = slots_ + turn * vectors_;
            if (threadIdx.x == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier, 16 * vectors_);
            }
            for (uint32_t i = threadIdx.x; i < vectors_; i += blockDim.x) {
                ptx::st_async(ptx::map_to_rank(ptx::shared_address(received + i), peer), data[i],
                              ptx::map_to_rank(barrier, peer));
            }
            wait_for_own(barrier, epoch_ / 2 % 2, vectors_);
            for (uint32_t i = threadIdx.x; i < vectors_; i += blockDim.x) {
                data[i] = peer < place_.rank ? combine<Op>(received[i], data[i]) : combine<Op>(data[i], received[i]);
            }
        }
        ++epoch_;
    }

  private:
    float4* slots_;
    uint32_t barriers_, vectors_, hops_;
    Place place_;
    uint32_t epoch_ = 0;
};

} // namespace fuseline
