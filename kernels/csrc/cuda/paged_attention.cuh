// A warp's part in a batch's paged attention: for each item of its cluster its tiles, its push, now and then a fold.
#pragma once

#include "kv_combine.cuh"

namespace fuseline {

// What the QKV projection left in global memory, read past L1.
struct ProjectedRows {
    const uint16_t* queries; // bf16 [batch, num_heads, D], rotated
    const float* keys;       // [batch, num_kv_heads, D], rotated, of each row's newest token
    const float* values;     // likewise
    const float* squares;    // [batch, num_heads + num_kv_heads, D / 16]: sums over 16 elements of a head before its
                             // norm, whose scale is still to be applied to queries and keys; null if there are no norms
    int32_t num_heads, heads_per_part;
    float scale, eps;
};

// The root mean square scale of a head of this row, 1 without norms.
template <int D>
__device__ inline float norm_scale(const ProjectedRows& projected, int64_t row, int32_t num_kv_heads, int32_t head) {
    if (projected.squares == nullptr) {
        return 1.0f;
    }
    const float* squares = projected.squares + (row * (projected.num_heads + num_kv_heads) + head) * (D / 16);
    float sum = 0.0f;
#pragma unroll
    for (int32_t i = 0; i < D / 16; i += 4) {
        const float4 part = ptx::load_l2(reinterpret_cast<const float4*>(squares + i));
        sum += (part.x + part.y) + (part.z + part.w);
    }
    return rsqrtf(sum / D + projected.eps);
}

template <int D>
struct WarpAttention {
    using Tile = KvTile<D>;

    const ProjectedRows& projected;
    const KvCache& cache;
    const AttendedRows& rows;
    const KvCombine<D>& combine;
    int32_t index, num_states; // of this warp in the cluster, and how many there are

    // `source` brings the KV pieces of the same walk, and whatever comes after them.
    template <class Source>
    __device__ void run(KvWalk<D>& walk, Ring& ring, Source& source) const {
        KvSoftmax<D> softmax;
        while (walk.next()) {
            const int32_t kv_head = walk.group / cache.parts, part = walk.group % cache.parts;
            const int32_t heads_per_kv = projected.num_heads / cache.num_kv_heads;
            const int32_t first = part * projected.heads_per_part;
            const int32_t heads = min(projected.heads_per_part, heads_per_kv - first);
            const int32_t first_head = kv_head * heads_per_kv + first;
            const int32_t state = walk.state_of(index, num_states);
            const int32_t first_tile = walk.first_tile_of(state, num_states);
            const bool any = first_tile < walk.end_tile;
            if (any) {
                load_queries(softmax, walk.row, first_head, heads);
                softmax.reset();
                for (int32_t tile = first_tile; tile < walk.end_tile; tile += num_states) {
                    take_tile(softmax, walk, tile * Tile::kTokens, kv_head, part, ring, source);
                }
            }
            combine.push(walk, softmax, any ? state : -1);
            if (combine.is_folder(walk.epoch)) {
                combine.fold(walk, rows, first_head, heads);
            }
        }
    }

  private:
    template <class Source>
    __device__ void take_tile(KvSoftmax<D>& softmax, const KvWalk<D>& walk, int32_t start, int32_t kv_head,
                              int32_t part, Ring& ring, Source& source) const {
        const bool edge = start < walk.begin || start + Tile::kTokens >= walk.end;
        const int64_t newest = (static_cast<int64_t>(walk.row) * cache.num_kv_heads + kv_head) * D;
        uint16_t* stored = nullptr;
        float scale = 1.0f;
        if (edge && walk.end - 1 >= start && walk.end - 1 < start + Tile::kTokens) {
            scale = norm_scale<D>(projected, walk.row, cache.num_kv_heads, projected.num_heads + kv_head);
            stored = part == 0 ? place_of_newest(walk, kv_head) : nullptr;
        }
        unsigned char* slot = ring.wait();
        if (edge) {
            complete_tile<D>(slot, start, walk.begin, walk.end, projected.keys + newest, scale, stored);
        }
        softmax.take_keys(slot, start, walk.begin, walk.end);
        ring.release();
        ring.refill(source);
        slot = ring.wait();
        if (edge) {
            complete_tile<D>(slot, start, walk.begin, walk.end, projected.values + newest, 1.0f,
                             stored == nullptr ? nullptr : stored + cache.values);
        }
        softmax.take_values(slot);
        ring.release();
        ring.refill(source);
    }

    // Where the row's newest key belongs in the cache.
    __device__ uint16_t* place_of_newest(const KvWalk<D>& walk, int32_t kv_head) const {
        const int32_t token = walk.end - 1;
        const int64_t block =
            cache.block_tables[static_cast<int64_t>(walk.row) * cache.table_width + token / cache.block_size];
        return cache.keys + ((block * cache.num_kv_heads + kv_head) * cache.block_size + token % cache.block_size) * D;
    }

    __device__ void load_queries(KvSoftmax<D>& softmax, int32_t row, int32_t first_head, int32_t heads) const {
        const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const uint16_t* from =
            projected.queries + (static_cast<int64_t>(row) * projected.num_heads + first_head + g) * D;
#pragma unroll
        for (int32_t j = 0; j < D / 32; ++j) {
            softmax.query[j] = make_uint4(0, 0, 0, 0);
            if (g < heads) {
                softmax.query[j] = ptx::load_l2(reinterpret_cast<const uint4*>(from + 32 * j + 8 * t));
            }
        }
        const float scale = projected.scale * 1.44269504f; // log2(e)
        const auto of_head = [&](int32_t head) {
            return head < heads ? scale * norm_scale<D>(projected, row, cache.num_kv_heads, first_head + head) : 0.0f;
        };
        softmax.scale = make_float2(of_head(2 * t), of_head(2 * t + 1));
    }
};

} // namespace fuseline
