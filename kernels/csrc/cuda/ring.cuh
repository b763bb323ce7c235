// A warp's private ring of slots in shared memory, which bulk copies fill ahead of use.
//
// The warp that consumes a slot also refills it, so nothing else synchronises: no producer warp, no "empty" barriers.
// A piece is whatever one slot holds. Sources decide what comes next: `bool issue(Ring&)` starts the copies of one
// piece, or returns false when it has none left. Pieces are consumed in the order in which they were issued.
#pragma once

#include "ptx.cuh"

namespace fuseline {

class Ring {
  public:
    // `slots`: stages * slot_bytes, a multiple of 16 each; `barriers`: stages mbarriers.
    __device__ Ring(unsigned char* slots, uint32_t slot_bytes, uint64_t* barriers, uint32_t stages)
        : slots_(slots), barriers_(ptx::shared_address(barriers)), slot_bytes_(slot_bytes), stages_(stages) {}

    // One lane; then fence_mbarrier_init and a barrier.
    __device__ void init() const {
#pragma unroll 1
        for (uint32_t stage = 0; stage < stages_; ++stage) {
            ptx::mbarrier_init(barriers_ + 8 * stage, 1);
        }
    }

    __device__ bool full() const { return in_flight_ == stages_; }

    // For a source: where the next piece goes, and what its copies complete. One lane arrives with the piece's bytes,
    // which may be none; afterwards all lanes call `issued`.
    __device__ uint32_t next_slot() const { return ptx::shared_address(slots_ + next_ * slot_bytes_); }
    __device__ uint32_t next_barrier() const { return barriers_ + 8 * next_; }
    __device__ void issued() {
        next_ = next_ + 1 == stages_ ? 0 : next_ + 1;
        ++in_flight_;
    }

    // Waits for the oldest piece; all lanes.
    __device__ unsigned char* wait() const {
        ptx::mbarrier_wait(barriers_ + 8 * oldest_, parity_);
        return slots_ + oldest_ * slot_bytes_;
    }

    // All lanes are done with the oldest piece. Lanes that stored into it call fence_proxy_async before.
    __device__ void release() {
        __syncwarp();
        oldest_ = oldest_ + 1 == stages_ ? 0 : oldest_ + 1;
        parity_ ^= oldest_ == 0;
        --in_flight_;
    }

    template <class Source>
    __device__ void refill(Source& source) {
        while (!full() && source.issue(*this)) {
        }
    }

  private:
    unsigned char* slots_;
    uint32_t barriers_, slot_bytes_, stages_;
    uint32_t next_ = 0, oldest_ = 0, parity_ = 0, in_flight_ = 0;
};

} // namespace fuseline
