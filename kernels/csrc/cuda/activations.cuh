// How x comes into shared memory for linear.cuh: from the residual stream through RMSNorm, or from global memory.
//
// RMSNorm is split: x = bf16(h * weight) goes into the multiplication as it is, and the sums are scaled by
// rsqrt(mean(h^2) + eps) of their token afterwards. So nobody waits for the mean, which needs the whole cluster.
// Scaling before or after rounding changes no relative error.
#pragma once

#include <cstdint>

#include "linear.cuh"

namespace fuseline {

// Sums of squares of every token's slices, which all CTAs of a cluster send to all.
class RowScales {
  public:
    // `sums`: bytes(cluster), at the same place in all CTAs; `barrier`: one mbarrier.
    __device__ RowScales(unsigned char* sums, uint64_t* barrier, uint32_t cluster, uint32_t rank)
        : sums_(reinterpret_cast<const float*>(sums)), barrier_(ptx::shared_address(barrier)), cluster_(cluster),
          rank_(rank) {}

    __host__ __device__ static constexpr uint32_t bytes(uint32_t cluster) { return 4 * MAX_BATCH * cluster; }

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init(uint32_t batch) const {
        ptx::mbarrier_init(barrier_, 1);
        ptx::mbarrier_arrive_expect_tx(barrier_, 4 * batch * cluster_);
    }

    // A whole warp, for a token's sum over this CTA's slice.
    __device__ void send(uint32_t token, float sum) const {
        const uint32_t lane = threadIdx.x % 32;
        if (lane < cluster_) {
            const uint32_t to = ptx::shared_address(sums_ + MAX_BATCH * rank_ + token);
            ptx::st_async(ptx::map_to_rank(to, lane), sum, ptx::map_to_rank(barrier_, lane));
        }
    }

    // Every thread, before `scale` and before its CTA ends.
    __device__ void wait() const { ptx::mbarrier_wait(barrier_, 0); }

    __device__ float scale(uint32_t token, uint32_t cols, float eps) const {
        float sum = 0.0f;
#pragma unroll 1
        for (uint32_t rank = 0; rank < cluster_; ++rank) {
            sum += sums_[MAX_BATCH * rank + token];
        }
        return rsqrtf(sum / static_cast<float>(cols) + eps);
    }

  private:
    const float* sums_;
    uint32_t barrier_, cluster_, rank_;
};

// The residual stream in front of a block: h = residual + delta, [tokens, cols] each.
struct Stream {
    const float* residual;
    const float* delta; // or null
    const uint16_t* norm;
    float* sum_out; // h, or null
    uint32_t cols;
    const int64_t* rows = nullptr; // which row is whose; null: as they come. For sum_out they come in order.
};

__device__ inline float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// x = bf16(h * norm) over the slice, and the tokens' sums of squares to the cluster. A warp takes whole tokens, so the
// order of a sum does not depend on the batch. Cluster `index` of `num_clusters` writes every so many-th token of
// sum_out. Needs a barrier of the CTA before x is read; each thread has fenced what it stored.
__device__ inline void load_normed(unsigned char* x, const Stream& stream, uint32_t batch, Slice slice,
                                   const RowScales& scales, uint32_t index, uint32_t num_clusters) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t token = warp; token < batch; token += LINEAR_WARPS) {
        const uint64_t row = (stream.rows == nullptr ? token : stream.rows[token]) * stream.cols;
        const bool writes = stream.sum_out != nullptr && token % num_clusters == index;
        uint16_t* target = reinterpret_cast<uint16_t*>(x);
        float squares = 0.0f;
#pragma unroll 4
        for (uint32_t i = 4 * lane; i < slice.cols(); i += 128) {
            const uint32_t col = slice.begin + i;
            float4 h = *reinterpret_cast<const float4*>(stream.residual + row + col);
            if (stream.delta != nullptr) {
                h = add(h, *reinterpret_cast<const float4*>(stream.delta + row + col));
            }
            const uint2 w = *reinterpret_cast<const uint2*>(stream.norm + col);
            squares += h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
            *reinterpret_cast<uint2*>(target + x_index(batch, token, i)) =
                make_uint2(ptx::pack_bf16x2(h.x * ptx::bf16_low(w.x), h.y * ptx::bf16_high(w.x)),
                           ptx::pack_bf16x2(h.z * ptx::bf16_low(w.y), h.w * ptx::bf16_high(w.y)));
            if (writes) {
                *reinterpret_cast<float4*>(stream.sum_out + row + col) = h;
            }
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        }
        scales.send(token, squares);
    }
    ptx::fence_proxy_async();
}

// The slice of an x that this grid has written to global memory, brought by bulk copies: whole if it fits, else in
// parts through two buffers, all of them again for every round of units. Each warp calls it at the same places.
class StreamedX {
  public:
    static constexpr int kBarriers = 4;

    // Shared memory to give it: `least` at least, and no more than all of the slice or what is `left`.
    __host__ __device__ static uint32_t room(uint32_t batch, uint32_t cols, uint32_t cluster, uint32_t least,
                                             uint32_t left) {
        least = max(least, 2 * x_bytes(batch, PIECE_COLS));
        const uint32_t most = max(least, x_slice_bytes(batch, cols, cluster));
        return divide_up(max(least, min(most, left)), 128) * 128;
    }

    // One thread; then fence_mbarrier_init and a barrier.
    __device__ static void init(const uint64_t* barriers) {
        for (uint32_t i = 0; i < kBarriers; ++i) {
            ptx::mbarrier_init(ptx::shared_address(barriers + i), i < 2 ? 1 : LINEAR_WARPS);
        }
    }

    // Nothing to bring: the slice is in shared memory.
    __device__ StreamedX(unsigned char* x, Slice slice) : buffers_(x), cols_(slice.cols()), part_cols_(cols_) {}

    // `buffers`: `room` bytes of shared memory; `barriers`: kBarriers mbarriers.
    __device__ StreamedX(unsigned char* buffers, uint32_t room, const uint64_t* barriers, const uint16_t* x,
                         uint32_t batch, Slice slice)
        : buffers_(buffers), barriers_(ptx::shared_address(barriers)),
          source_(reinterpret_cast<const unsigned char*>(x + x_index(batch, 0, slice.begin))),
          part_bytes_(x_bytes(batch, slice.cols())), cols_(slice.cols()), part_cols_(cols_) {
        if (part_bytes_ > room) {
            part_cols_ = room / 2 / x_bytes(batch, PIECE_COLS) * PIECE_COLS;
            part_bytes_ = x_bytes(batch, part_cols_);
        }
        parts_ = divide_up(cols_, part_cols_);
        chunk_bytes_ = x_bytes(batch, CHUNK_COLS);
    }

    // Once, behind a grid barrier, in front of which the writers of x have called fence_proxy_async_global. `rounds`:
    // how often each part is used.
    __device__ void start(uint32_t rounds) {
        left_ = parts_ == 1 ? 1 : rounds * parts_;
        if (threadIdx.x < 32) {
            ptx::fence_proxy_async_global();
            load();
        }
    }

    __device__ uint32_t part_cols() const { return part_cols_; }

    __device__ const unsigned char* acquire() {
        const uint32_t buffer = now_ % 2;
        if (parts_ > 1 && threadIdx.x < 32 && left_ != 0) { // the next one, in place of the one before
            if (now_ != 0) {
                ptx::mbarrier_wait(empty(buffer ^ 1), (now_ - 1) / 2 % 2);
            }
            load();
        }
        if (parts_ != 0) {
            ptx::mbarrier_wait(full(buffer), now_ / 2 % 2);
        }
        return buffers_ + buffer * part_bytes_;
    }

    __device__ void release() {
        if (parts_ > 1) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                ptx::mbarrier_arrive(empty(now_ % 2));
            }
            ++now_;
        }
    }

  private:
    __device__ uint32_t full(uint32_t buffer) const { return barriers_ + 8 * buffer; }
    __device__ uint32_t empty(uint32_t buffer) const { return barriers_ + 16 + 8 * buffer; }

    // The next part, by one warp.
    __device__ void load() {
        constexpr uint32_t kCopyBytes = 8192;
        const uint32_t part = loads_ % parts_, buffer = loads_ % 2;
        const uint32_t bytes = min(part_cols_, cols_ - part * part_cols_) / CHUNK_COLS * chunk_bytes_;
        const unsigned char* from = source_ + part * part_bytes_;
        const uint32_t to = ptx::shared_address(buffers_) + buffer * part_bytes_;
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(full(buffer), bytes);
        }
        for (uint32_t at = threadIdx.x * kCopyBytes; at < bytes; at += 32 * kCopyBytes) {
            ptx::bulk_load(to + at, from + at, min(kCopyBytes, bytes - at), full(buffer));
        }
        ++loads_;
        --left_;
    }

    unsigned char* buffers_;
    uint32_t barriers_ = 0;
    const unsigned char* source_ = nullptr;
    uint32_t part_bytes_ = 0, chunk_bytes_ = 0, cols_, part_cols_;
    uint32_t parts_ = 0;            // 0: nothing to wait for
    uint32_t left_ = 0, loads_ = 0; // of warp 0
    uint32_t now_ = 0;
};

// Until every CTA of the grid, all of them resident, has come here; what their threads wrote to global memory before is
// then visible to all. `word` is zero before the first use and needs no reset: bit 31 flips each time.
__device__ inline void grid_barrier(uint32_t* word) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
        ptx::wait_top_bit_change(word, ptx::fetch_add_acq_rel(word, add));
    }
    __syncthreads();
}

} // namespace fuseline
