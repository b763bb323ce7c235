// The C interface of the CUDA kernels: what kernels/cuda loads by ctypes.
//
// Every function takes one struct by pointer, which it copies, and returns a cudaError_t: 0, or why nothing was
// launched. A struct whose `version` is not FL_CUDA_API is refused (cudaErrorInvalidValue), as are sizes that a kernel
// was not made for; shapes, dtypes and devices of the pointers are the launcher's to check. Work is queued on `stream`
// and can be captured in a graph. Floats called `bf16` are 16-bit patterns. Matrices called `packed` are in the order
// of packing.h. No output may overlap an input unless a comment says so.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
#pragma GCC visibility push(default)
extern "C" {
#endif

#define FL_CUDA_API 1

typedef uint16_t fl_bf16;

// How a block is spread over the GPU; results do not depend on num_clusters, stages, or the batch, but do on cluster.
typedef struct {
    int32_t cluster;      // CTAs per cluster: 1, 2, 4, 8; each takes such a part of every row of a weight
    int32_t num_clusters; // at most what fl_cuda_*_limits says: all of them must be resident at once
    int32_t stages;       // weight pieces of 4 KB that each of a CTA's 8 warps has in flight
    int32_t dependent;    // 1: start while the kernel before is ending (programmatic dependent launch)
} fl_launch;

typedef struct {
    int32_t shared_bytes; // dynamic shared memory of a CTA
    int32_t max_clusters; // that are resident at once on this device
} fl_limits;

// RMSNorm of residual + delta, gate and up projection, SwiGLU, down projection.
typedef struct {
    int32_t version;
    int32_t batch;  // tokens, 1 to 64
    int32_t hidden; // multiple of 32 * cluster
    int32_t inner;  // multiple of 32
    float eps;
    fl_launch launch;
    const float* residual;       // [batch, hidden]
    const float* delta;          // [batch, hidden] or null
    const fl_bf16* norm;         // [hidden]
    const fl_bf16* gate_up;      // packed [2 * inner, hidden], gate and up interleaved
    const fl_bf16* gate_up_bias; // [2 * inner], gate then up, or null
    const fl_bf16* down;         // packed [hidden, inner]
    const fl_bf16* down_bias;    // [hidden] or null
    float* residual_out;         // [batch, hidden]: residual + delta
    float* delta_out;            // [batch, hidden]
    void* workspace;             // fl_cuda_mlp_workspace bytes, zeroed once when allocated, one per stream
    const void* prefetch;        // what the next kernel reads first, brought into L2 towards the end; or null
    int64_t prefetch_bytes;
    void* stream;
} fl_mlp_args;

int64_t fl_cuda_mlp_workspace(const fl_mlp_args* args);
int fl_cuda_mlp_limits(const fl_mlp_args* args, fl_limits* limits);
int fl_cuda_mlp_block(const fl_mlp_args* args);

#ifdef __cplusplus
}
#pragma GCC visibility pop
#endif
