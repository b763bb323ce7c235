// A rank's share of a decoder as a program of ops, any range of which is one call and one parallel region:
//
// clang-format off: it would run the lines together
//     0          the input: token embeddings (a partial sum if the vocabulary is sharded), or hidden states given
//     1 + 2 i    attention block of layer i: norm, QKV, norms of Q and K, rotary embedding, KV append, attention, O
//     2 + 2 i    MLP block of layer i: norm, gate and up, SwiGLU, down
//     1 + 2 n    the output: logits of the wanted rows, or the hidden states
//
// clang-format on
// The stream between ops is the step's own memory: `residual` and, apart from it, the last block's output `delta`,
// which is the next op's to add. So whoever calls may stop anywhere, all-reduce delta, and go on. Steps of more than
// kChunkRows tokens are computed in pieces of so many inside each op, so scratch does not grow with the step.
#pragma once

#include <cstdint>

#include "linear.h"

namespace fuseline {

// Adds up data[n] over the ranks, in place, in rank order. Returns 0, or what the step then fails with (above 0).
using AllReduce = int32_t (*)(void* handle, float* data, int64_t n);

// Mirrored by kernels/cpu/decoder.py, as are the two below. Norms and biases are float32.
struct DecoderLayer {
    LinearWeight qkv[3]; // parts that make [Q; K; V] one under the other
    LinearWeight out;
    LinearWeight gate_up[2]; // parts that make [gate; up]
    LinearWeight down;
    const float* attention_norm;
    const float* q_norm; // [head_dim], or null, as k_norm
    const float* k_norm;
    const float* mlp_norm;
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t window; // 0 for all
    float scale, eps;
    int32_t num_qkv, num_gate_up; // parts
};

struct DecoderModel {
    const DecoderLayer* layers;
    int64_t num_layers;
    int64_t hidden;
    LinearWeight embedding; // rows of the vocabulary from vocab_start on, of a model that embeds; may have none
    int64_t vocab_start, vocab_size;
    LinearWeight head; // of a model that has a head; its rows may be none
    const float* norm; // in front of it
    float eps;
    float rotary_scaling;
    AllReduce all_reduce; // of what the input op and the blocks leave; null if the caller does it, or nobody needs to
    void* all_reduce_handle;
    int32_t embeds;   // 0 on all stages but the first
    int32_t has_head; // 0 on all but the last
};

// One step: its metadata (see StepMetadata in kernels/types.py), its KV cache, and what the ops work on.
struct DecoderStep {
    int64_t num_tokens, num_seqs, num_logits;
    const int64_t* token_ids; // [num_tokens]; null on later stages
    const int64_t* positions;
    const int64_t* slots;
    const int64_t* logits_indices; // [num_logits]
    const int32_t* query_start;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t table_stride;
    const float* inv_freq; // of the input op: [head_dim / 2] per token, inv_freq_stride apart (0: the same for all)
    int64_t inv_freq_stride;
    float* cos; // [num_tokens, head_dim / 2], written by the input op
    float* sin;
    float* residual; // [num_tokens, hidden]; holds the hidden states when the input op is not to embed
    float* delta;    // likewise
    float* output;   // [num_logits, vocabulary rows], or [num_tokens, hidden]
    void* kv_data;   // [num_layers, 2, num_blocks, num_kv_heads, block_size, row], see KvLayer
    int64_t num_blocks, block_size;
    int32_t kv_dtype;
    int32_t has_delta; // whether delta is to be added; changed by a run as the ops change it
    int32_t prepared;  // 0 before a step's first run
    int32_t reserved;
};

// What a run fails with, before anything is computed.
constexpr int32_t kNoMemory = -1, kBadToken = -2, kBadSlot = -3, kBadBlock = -4, kBadLogitsIndex = -5;

constexpr int64_t kChunkRows = 256;

} // namespace fuseline
