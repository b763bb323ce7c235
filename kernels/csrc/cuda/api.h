// The C interface of the CUDA kernels: what kernels/cuda loads by ctypes.
//
// Every function takes one struct by pointer, which it copies, and returns a cudaError_t: 0, or why nothing was
// launched. A struct whose `version` is not FL_CUDA_API is refused (cudaErrorInvalidValue), as are sizes that a kernel
// was not made for; shapes, dtypes and devices of the pointers are the launcher's to check. Work is queued on `stream`
// and can be captured in a graph. Floats called `bf16` are 16-bit patterns. Matrices called `packed` are in the order
// of kernels/packed.py. No output may overlap an input unless a comment says so.
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
    int32_t cluster;          // CTAs per cluster: 1, 2, 4, 8; each takes such a part of every row of a weight
    int32_t num_clusters;     // at most what fl_cuda_*_limits says: all of them must be resident at once
    int32_t stages;           // weight pieces of 4 KB that each of a CTA's 8 warps has in flight
    int32_t dependent;        // 1: start while the kernel before is ending (programmatic dependent launch)
    int32_t max_shared_bytes; // of a CTA, as far as a kernel has a choice; 0 for all there is
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

// Final RMSNorm of rows of residual + delta, and their logits: all, or the best few of each row, or both.
typedef struct {
    int32_t version;
    int32_t batch;          // rows, 1 to 64
    int32_t hidden;         // multiple of 32 * cluster
    int32_t vocab;          // rows of the weight that count
    int32_t num_candidates; // per row, at most vocab; 0 for none
    float eps;
    fl_launch launch;        // at most 256 CTAs
    const float* residual;   // [tokens, hidden]
    const float* delta;      // [tokens, hidden] or null
    const int64_t* rows;     // [batch]: which tokens; or null for the first ones
    const fl_bf16* norm;     // [hidden]
    const fl_bf16* weight;   // packed [vocab, hidden], rows of zeros up to a multiple of 16
    float* logits;           // [batch, vocab], or null
    float* candidate_logits; // [batch, num_candidates], best first; of equal ones the lower row first
    int32_t* candidate_rows; // [batch, num_candidates]
    void* workspace;         // fl_cuda_head_workspace bytes, zeroed once when allocated, one per stream; usable for
                             // smaller batches with the same cluster and num_clusters
    void* stream;
} fl_head_args;

int64_t fl_cuda_head_workspace(const fl_head_args* args);
int fl_cuda_head_limits(const fl_head_args* args, fl_limits* limits);
int fl_cuda_head(const fl_head_args* args);

// One collective of cluster.cuh, to measure: every CTA of every cluster brings a vector.
#define FL_SUM 0
#define FL_MAX 1
#define FL_GATHER 2

#define FL_ONE_SHOT 0
#define FL_LOG2 1     // not for FL_GATHER
#define FL_OFF_CHIP 2 // through global memory; all CTAs must be resident at once
#define FL_SCATTER 3  // in two hops; not for FL_GATHER; elements is a multiple of 4 * cluster

typedef struct {
    int32_t version;
    int32_t kind;
    int32_t form;
    int32_t cluster; // 1, 2, 4, 8, 16
    int32_t num_clusters;
    int32_t elements;   // of a CTA's vector, a multiple of 4
    int32_t repeats;    // in a row: reductions of the result before, gathers of the same (one at least)
    const float* input; // [num_clusters, cluster, elements]
    float* output;      // the same; for FL_GATHER [num_clusters, cluster, cluster * elements]
    void* workspace;    // fl_cuda_collective_workspace bytes, zeroed once; for FL_OFF_CHIP
    void* stream;
} fl_collective_args;

int64_t fl_cuda_collective_workspace(const fl_collective_args* args);
int fl_cuda_collective_limits(const fl_collective_args* args, fl_limits* limits);
int fl_cuda_collective(const fl_collective_args* args);

// How fast CTAs of a cluster reach the next one's shared memory.
#define FL_DSMEM_LATENCY 0 // a chain of `repeats` loads of 4 bytes
#define FL_DSMEM_LOADS 1   // all of the buffer by 16-byte loads, `repeats` times
#define FL_DSMEM_COPIES 2  // the same by bulk copies and a cluster barrier

typedef struct {
    int32_t version;
    int32_t cluster; // 2, 4, 8, 16
    int32_t num_clusters;
    int32_t mode;
    int32_t bytes; // of a CTA's buffer, a multiple of 256
    int32_t repeats;
    int64_t* ticks; // [num_clusters * cluster]: clock cycles
    void* stream;
} fl_dsmem_args;

int fl_cuda_dsmem(const fl_dsmem_args* args);

const char* fl_cuda_error_name(int error); // of a cudaError_t

// RMSNorm of residual + delta, QKV projection, norms of Q and K, rotary embedding, KV append, paged attention, output
// projection; one token per sequence.
typedef struct {
    int32_t version;
    int32_t batch;     // tokens, 1 to 64
    int32_t hidden;    // multiple of 32, at least 32 * cluster
    int32_t num_heads; // multiple of num_kv_heads
    int32_t num_kv_heads;
    int32_t head_dim;            // 64 or 128
    int32_t block_size;          // tokens of a KV block: a power of two, at least 8
    int32_t table_width;         // columns of block_tables
    int32_t window;              // tokens that a query sees, itself included; 0 for all
    float scale;                 // of the scores
    float eps;                   // of the norms
    fl_launch launch;            // cluster: at most 4 for head_dim 64
    int64_t num_blocks;          // of the cache
    const float* residual;       // [batch, hidden]
    const float* delta;          // [batch, hidden] or null
    const fl_bf16* norm;         // [hidden]
    const fl_bf16* qkv;          // packed [(num_heads + 2 * num_kv_heads) * head_dim, hidden], rows of Q, K, V; of each
                                 // head rows d and d + head_dim / 2 in the same lane: units of 8 of the lower half and
                                 // the same 8 of the upper half
    const fl_bf16* qkv_bias;     // [rows of qkv], in the model's order, or null
    const fl_bf16* q_norm;       // [head_dim] or null; both or none
    const fl_bf16* k_norm;       // [head_dim] or null
    const fl_bf16* out;          // packed [hidden, num_heads * head_dim]
    const fl_bf16* out_bias;     // [hidden] or null
    const float* rotary_cos;     // [batch, head_dim / 2]
    const float* rotary_sin;     // [batch, head_dim / 2]
    fl_bf16* kv;                 // [2, num_blocks, num_kv_heads, block_size, head_dim]; the tokens' KV is written here
    const int32_t* block_tables; // [batch, table_width]; entries past a context are not read
    const int32_t* context_lens; // [batch], the token of this step included; 0 for a row that is only padding
    float* residual_out;         // [batch, hidden]: residual + delta
    float* delta_out;            // [batch, hidden]
    void* workspace;      // fl_cuda_attention_workspace bytes, zeroed once when allocated, one per stream; usable
                          // for other batches and blocks of the same heads and at most this size
    const void* prefetch; // what the next kernel reads first, brought into L2 towards the end; or null
    int64_t prefetch_bytes;
    void* stream;
} fl_attention_args;

int64_t fl_cuda_attention_workspace(const fl_attention_args* args);
int fl_cuda_attention_limits(const fl_attention_args* args, fl_limits* limits);
int fl_cuda_attention_block(const fl_attention_args* args);

#ifdef __cplusplus
}
#pragma GCC visibility pop
#endif
