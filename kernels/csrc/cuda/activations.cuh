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

// x[token] = bf16(h * norm) over the slice, and the tokens' sums of squares to the cluster. A warp takes whole tokens,
// so the order of a sum does not depend on the batch. Cluster `index` of `num_clusters` writes every so many-th token
// of sum_out. Needs a barrier of the CTA before x is read; each thread has fenced what it stored.
__device__ inline void load_normed(unsigned char* x, const Stream& stream, uint32_t batch, Slice slice,
                                   const RowScales& scales, uint32_t index, uint32_t num_clusters) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t token = warp; token < batch; token += LINEAR_WARPS) {
        const uint64_t row = (stream.rows == nullptr ? token : stream.rows[token]) * stream.cols;
        const bool writes = stream.sum_out != nullptr && token % num_clusters == index;
        uint2* target = reinterpret_cast<uint2*>(x + token * slice.row_bytes());
        float squares = 0.0f;
#pragma unroll 4
        for (uint32_t i = lane; i < slice.cols() / 4; i += 32) {
            const uint32_t col = slice.begin + 4 * i;
            float4 h = *reinterpret_cast<const float4*>(stream.residual + row + col);
            if (stream.delta != nullptr) {
                h = add(h, *reinterpret_cast<const float4*>(stream.delta + row + col));
            }
            const uint2 w = *reinterpret_cast<const uint2*>(stream.norm + col);
            squares += h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
            target[i] = make_uint2(ptx::pack_bf16x2(h.x * ptx::bf16_low(w.x), h.y * ptx::bf16_high(w.x)),
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

// x[token] = the slice of bf16 rows [batch, cols] in global memory, by bulk copies that complete `barrier` once. Called
// by one warp; whoever wrote the rows has fenced (fence_proxy_async_global) and this warp's CTA has acquired them.
__device__ inline void load_rows(unsigned char* x, const uint16_t* rows, uint32_t batch, uint32_t cols, Slice slice,
                                 uint32_t barrier) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(barrier, batch * 2 * slice.cols());
    }
    ptx::fence_proxy_async_global();
    for (uint32_t token = lane; token < batch; token += 32) {
        ptx::bulk_load(ptx::shared_address(x) + token * slice.row_bytes(),
                       rows + static_cast<uint64_t>(token) * cols + slice.begin, 2 * slice.cols(), barrier);
    }
}

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
