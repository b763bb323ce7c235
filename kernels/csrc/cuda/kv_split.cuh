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

// What the items of a launch have in common.
struct KvWork {
    int32_t window; // 0: none
    int32_t num_groups, num_clusters;
    int32_t parts;      // groups per KV head
    int32_t num_states; // of a node: the cluster's warps, a power of two
    int32_t tile_bits;  // log2 of a tile's tokens
};

struct KvItem {
    int32_t row, kv_head, part;
    int32_t node, first_node, num_nodes; // numbered through the batch; the row's first, and how many
    int32_t begin, end;                  // the row's span
    int32_t first_tile, end_tile;        // the node's, as far as the row sees it
};

// The items of one cluster, one per epoch; all of its warps go through them in step.
class KvWalk {
  public:
    __device__ KvWalk(const KvPlan& plan, const KvWork& work, int32_t cluster_index)
        : plan_(plan), work_(work), cluster_index_(cluster_index) {}

    __device__ const KvWork& work() const { return work_; }

    __device__ bool has(int32_t epoch) const {
        return number(epoch) < plan_.nodes_before[ATTN_MAX_BATCH] * work_.num_groups;
    }

    // All lanes of a warp.
    __device__ KvItem item(int32_t epoch) const {
        KvItem item;
        item.node = number(epoch) / work_.num_groups;
        const int32_t group = number(epoch) - item.node * work_.num_groups;
        item.kv_head = group / work_.parts;
        item.part = group - item.kv_head * work_.parts;
        item.row = 0;
        for (int32_t first = 0; first < ATTN_MAX_BATCH; first += 32) {
            const int32_t row = first + static_cast<int32_t>(threadIdx.x % 32);
            item.row += __popc(__ballot_sync(0xffffffffu, plan_.nodes_before[row + 1] <= item.node));
        }
        const KvSpan span(plan_.context[item.row], work_.window);
        item.first_node = plan_.nodes_before[item.row];
        item.num_nodes = span.num_nodes();
        item.begin = span.begin;
        item.end = span.end;
        const int32_t start = (span.first_node() + item.node - item.first_node) << span.node_bits;
        const int32_t stop = min(start + (1 << span.node_bits), span.end);
        item.first_tile = max(start, span.begin) >> work_.tile_bits;
        item.end_tile = ((stop - 1) >> work_.tile_bits) + 1;
        return item;
    }

    // The first tile of the state that warp `index` of the cluster computes in this epoch. Rotated from epoch to epoch,
    // so that short contexts do not keep the same warps busy.
    __device__ int32_t first_tile(const KvItem& item, int32_t epoch, int32_t index) const {
        return item.first_tile + ((index + 11 * epoch - item.first_tile) & (work_.num_states - 1));
    }

  private:
    __device__ int32_t number(int32_t epoch) const { return cluster_index_ + epoch * work_.num_clusters; }

    const KvPlan& plan_;
    const KvWork& work_;
    int32_t cluster_index_;
};

} // namespace fuseline
