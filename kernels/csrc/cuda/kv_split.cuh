// How the sequences of a decoding batch are cut into work items, from positions alone: never from the batch around
// them, so that a row's result does not depend on it.
//
//   tile   what a warp takes at a time: 2048 / D tokens
//   state  the online softmax of one warp over the tiles T of a node with T % num_states == state
//   node   1024 tokens, or a power of two more, that start at a multiple of their number; num_states states are folded
//          into one in order of position, and so are a row's nodes
//   item   a node for up to 8 query heads that share a KV head: the work of one cluster
//
// Items are dealt out to clusters in turn. They are planned on the device, from the context lengths, because a replayed
// graph has no other way to learn them.
#pragma once

#include "attention_tiles.h"
#include "ptx.cuh"

namespace fuseline {

// The tokens that a row's query sees, [begin, end); the last is its own.
struct KvSpan {
    int32_t begin, end;
    int32_t node_bits; // log2 of a node's tokens

    __device__ KvSpan(int32_t context, int32_t window) : begin(0), end(context), node_bits(0) {
        if (window > 0 && window < context) {
            begin = context - window;
        }
        int32_t node_tokens = ATTN_NODE_TOKENS;
        while (node_tokens > 1 << node_bits) {
            ++node_bits;
        }
        while (end - begin > ATTN_MAX_NODES << node_bits) {
            ++node_bits;
        }
    }

    __device__ int32_t first_node() const { return begin >> node_bits; }
    __device__ int32_t num_nodes() const { return end <= 0 ? 0 : ((end - 1) >> node_bits) - first_node() + 1; }
};

// In shared memory. Nodes are numbered through the batch, row after row.
struct KvPlan {
    int32_t context[ATTN_MAX_BATCH];
    int32_t nodes_before[ATTN_MAX_BATCH + 1]; // those of the rows before; for rows from `batch` on, all
};

// One warp fills the plan; a barrier follows.
__device__ inline void plan_kv(KvPlan& plan, const int32_t* context_lens, int32_t batch, int32_t window) {
    const int32_t lane = threadIdx.x % 32;
    int32_t before = 0;
    for (int32_t first = 0; first < ATTN_MAX_BATCH; first += 32) {
        const int32_t row = first + lane;
        const int32_t context = row < batch ? context_lens[row] : 0;
        int32_t sum = KvSpan(context, window).num_nodes();
        for (int32_t distance = 1; distance < 32; distance *= 2) {
            const int32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        plan.context[row] = context;
        plan.nodes_before[row + 1] = before + sum;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
        plan.nodes_before[0] = 0;
    }
}

// Walks the items of a cluster, in step with its other warps.
template <int D>
struct KvWalk {
    static constexpr int32_t kTileTokens = ATTN_TILE_BYTES / (2 * D);

    // Of the item at hand.
    int32_t epoch = -1;                  // how many the cluster has had before it
    int32_t row, group;                  // the batch's row; KV head times parts of its query heads
    int32_t node, first_node, num_nodes; // numbered through the batch; the row's first, and how many
    int32_t begin, end;                  // the row's span
    int32_t first_tile, end_tile;

    __device__ KvWalk(const KvPlan& plan, int32_t window, int32_t num_groups, int32_t cluster_id, int32_t num_clusters)
        : plan_(plan), window_(window), num_groups_(num_groups), next_(cluster_id), step_(num_clusters),
          num_items_(plan.nodes_before[ATTN_MAX_BATCH] * num_groups) {}

    __device__ bool has_next() const { return next_ < num_items_; }

    // To the next item; false if there is none. All lanes of a warp.
    __device__ bool next() {
        if (!has_next()) {
            return false;
        }
        node = next_ / num_groups_;
        group = next_ - node * num_groups_;
        next_ += step_;
        ++epoch;
        const int32_t lane = threadIdx.x % 32;
        row = 0;
        for (int32_t first = 0; first < ATTN_MAX_BATCH; first += 32) {
            row += __popc(__ballot_sync(0xffffffffu, plan_.nodes_before[first + lane + 1] <= node));
        }
        const KvSpan span(plan_.context[row], window_);
        num_nodes = span.num_nodes();
        begin = span.begin;
        end = span.end;
        first_node = plan_.nodes_before[row];
        const int32_t start = (span.first_node() + node - first_node) << span.node_bits;
        first_tile = max(start, begin) / kTileTokens;
        end_tile = (min(start + (1 << span.node_bits), end) + kTileTokens - 1) / kTileTokens;
        return true;
    }

    // The state that warp `index` of num_states in the cluster computes, and its first tile; rotated from item to item,
    // so that short contexts do not keep the same warps busy.
    __device__ int32_t state_of(int32_t index, int32_t num_states) const {
        return (index + 11 * epoch) & (num_states - 1);
    }
    __device__ int32_t first_tile_of(int32_t state, int32_t num_states) const {
        return first_tile + ((state - first_tile) & (num_states - 1));
    }

  private:
    const KvPlan& plan_;
    int32_t window_, num_groups_, next_, step_, num_items_;
};

} // namespace fuseline
