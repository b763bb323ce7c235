// Causal attention of a step's queries over the paged KV cache, decodes and prefill chunks alike.
//
// A query walks its context in splits of kSplit positions, counted from position 0: within a split softmax is taken of
// all visible scores, and splits are merged in order. Which queries are computed together, by whom, and whether one
// worker walks all splits or several each take some, changes nothing in that order, so a query's result depends on
// its context alone, to the bit. Nothing outside a context is read; what one query may not see of its neighbours'
// keys and values (NaN included) does not reach it.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "team.h"

namespace fuseline {

constexpr int64_t kSplit = 256;

// Bytes behind the integers of a row of int8: its float32 scale, at any address.
constexpr int64_t kScaleBytes = 4;

// One layer of the cache: [2, num_blocks, num_heads, block_size, row], keys, then values; a row is as
// kernels/kv_rows.py says.
struct KvLayer {
    void* data;
    int64_t num_blocks;
    int64_t num_heads;
    int64_t block_size;
    int64_t head_dim;
    DType dtype;

    // Elements of one head's slot.
    int64_t row() const { return dtype == DType::i8 ? head_dim + kScaleBytes : head_dim; }
    int64_t element_bytes() const { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }
    // Elements from a key to the value of the same place.
    int64_t values_offset() const { return num_blocks * num_heads * block_size * row(); }
    // The element that a head's slot of a block begins at.
    int64_t at(int64_t block, int64_t head, int64_t offset) const {
        return ((block * num_heads + head) * block_size + offset) * row();
    }
};

// Where the tokens of a step stand; see StepMetadata in kernels/types.py.
struct Sequences {
    int64_t count;
    const int32_t* query_start;  // [count + 1]
    const int32_t* context_lens; // [count]
    const int32_t* block_tables; // [count, table_stride]
    int64_t table_stride;

    int64_t query_end(int64_t sequence) const { return query_start[sequence + 1]; }
    int64_t position(int64_t sequence, int64_t token) const {
        return context_lens[sequence] - (query_end(sequence) - token);
    }
};

struct AttentionShape {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t window; // positions a query sees, itself included; 0 for all
    float scale;

    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t first_visible(int64_t position) const {
        return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
    }
};

// The queries of `num_positions` adjacent tokens of a sequence, of the heads that share a KV head, and the splits that
// one worker walks for them. With `partial` >= 0 each split's result is kept apart, from that row of partials on.
struct AttentionUnit {
    int32_t sequence;
    int32_t kv_head;
    int64_t first_token; // of the step
    int64_t num_positions;
    int64_t first_position;
    int64_t first_split, end_split;
    int64_t partial;
};

// Some tokens of a step cut into units for layers of one window, and what to merge when they are done.
struct AttentionPlan {
    std::vector<AttentionUnit> units;  // the costly ones first
    std::vector<AttentionUnit> merges; // all splits of a query whose splits went to several workers
    int64_t num_partials = 0;

    // Rows of partials that are ever asked for.
    static constexpr int64_t kMaxPartials = 16384;

    void make(const Sequences& sequences, const AttentionShape& shape, Range tokens, int num_workers);
};

// Floats of scratch that each worker needs, and that a row of partials takes.
int64_t attention_scratch_floats(const AttentionShape& shape);
int64_t partial_floats(int64_t head_dim);

// One call's arguments. Rows of queries and out are those of `tokens`, so token t is row t - tokens.begin.
struct Attention {
    AttentionShape shape;
    KvLayer kv;
    Sequences sequences;
    Range tokens;
    const float* queries; // [rows, query_stride], num_heads * head_dim of each row
    int64_t query_stride;
    float* out; // [rows, num_heads * head_dim]
    float* partials;

    void run(const AttentionUnit& unit, float* scratch) const;
    // After a barrier that follows all units.
    void merge(const AttentionUnit& unit, float* scratch) const;
};

} // namespace fuseline
