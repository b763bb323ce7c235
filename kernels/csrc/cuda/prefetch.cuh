// Hands the memory to the next kernel before this one has ended.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "ring.cuh"

namespace fuseline {

// Every warp of the grid brings its share of `bytes` into L2; a last part of less than 4 KB stays where it is.
__device__ inline void prefetch_share(const void* start, int64_t bytes) {
    constexpr int64_t kChunk = 4096;
    const int64_t warps = gridDim.x * (blockDim.x / 32), warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const auto* from = static_cast<const unsigned char*>(start);
#pragma unroll 1
    for (int64_t at = warp * kChunk; at + kChunk <= bytes; at += warps * kChunk) {
        if (threadIdx.x % 32 == 0) {
            ptx::bulk_prefetch_l2(from + at, kChunk);
        }
    }
}

// A source behind the last of a kernel's: when they have nothing left to issue, the memory is the next kernel's.
struct PrefetchSource {
    const void* start;
    int64_t bytes;

    __device__ bool issue(Ring&) {
        prefetch_share(start, bytes);
        bytes = 0;
        return false;
    }
};

} // namespace fuseline
