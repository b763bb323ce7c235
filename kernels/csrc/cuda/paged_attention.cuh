// A warp's part in a batch's paged attention: for each item of its cluster its tiles, its push, now and then a fold.
#pragma once

#include "kv_combine.cuh"

namespace fuseline {

// What the QKV projection left in global memory, read past L1.
struct ProjectedRows {
    uint16_t* queries; // bf16 [batch, num_heads, D], rotated
    float* keys;       // [batch, num_kv_heads, D], rotated, of each row's newest token
    float* values;     // likewise
    float* squares;    // [batch, num_heads + num_kv_heads, D / 16]: sums over 16 elements of a head before its norm,
                       // whose scale is still to be applied to queries and keys; null if there are no norms
    int32_t num_heads, num_kv_heads;
    float scale, eps;
};

// The root mean square scale of a head of a row, 1 without norms.
template <int D>
__device__ inline float norm_scale(const ProjectedRows& projected, int32_t row, int32_t head) {
    if (projected.squares == nullptr) {
        return 1.0f;
    }
    const int64_t index = static_cast<int64_t>(row) * (projected.num_heads + projected.num_kv_heads) + head;
    const auto* squares = reinterpret_cast<const float4*>(projected.squares + index * (D / 16));
    float sum = 0.0f;
#pragma unroll
    for (int32_t i = 0; i < D / 64; ++i) {
        const float4 part = ptx::load_l2(squares + i);
        sum += (part.x + part.y) + (part.z + part.w);
    }
    return rsqrtf(sum / D + projected.eps);
}

// Warp `index` of its cluster; it shares the rest.
template <int D>
struct WarpAttention {
    using Tile = KvTile<D>;

    const ProjectedRows& projected;
    const KvCache& cache;
    const AttendedRows& rows;
    const KvCombine<D>& combine;
    int32_t index;

    // `source` brings the KV pieces of the same walk, and then whatever comes after them.
    template <class Source>
    __device__ void run(const KvWalk& walk, Ring& ring, Source& source) const {
        for (int32_t epoch = 0; walk.has(epoch); ++epoch) {
            const KvItem item = walk.item(epoch);
            const int32_t first = walk.first_tile(item, epoch, index);
            if (first < item.end_tile) {
                KvSoftmax<D> softmax;
                load_queries(softmax, item);
                softmax.reset();
                for (int32_t tile = first; tile < item.end_tile; tile += walk.work().num_states) {
                    take_tile(softmax, item, tile * Tile::kTokens, ring, source);
                }
                combine.push(epoch, softmax, first);
            }
            if (combine.is_folder(epoch)) {
                combine.fold(walk, epoch, rows);
            } else {
                combine.arrive(epoch);
            }
        }
    }

  private:
    template <class Source>
    __device__ void take_tile(KvSoftmax<D>& softmax, const KvItem& item, int32_t start, Ring& ring,
                              Source& source) const {
        const bool edge = start < item.begin || start + Tile::kTokens >= item.end;
#pragma unroll 1 // twice the code would be no faster
        for (int32_t values = 0; values < 2; ++values) {
            unsigned char* slot = ring.wait();
            if (edge) {
                complete(slot, item, start, values != 0);
            }
            if (values == 0) {
                softmax.take_keys(slot, start, item.begin, item.end);
            } else {
                softmax.take_values(slot);
            }
            ring.release();
            ring.refill(source);
        }
    }

    __device__ void complete(unsigned char* slot, const KvItem& item, int32_t start, bool values) const {
        const int32_t newest = item.end - 1;
        const int64_t index = (static_cast<int64_t>(item.row) * cache.num_kv_heads + item.kv_head) * D;
        uint16_t* stored = nullptr;
        float scale = 1.0f;
        if (newest >= start && newest < start + Tile::kTokens) {
            if (item.part == 0) {
                stored = cache.keys + (values ? cache.values : 0) +
                         cache.place_of(cache.block_of(item.row, newest), item.kv_head, newest) * D;
            }
            if (!values) {
                scale = norm_scale<D>(projected, item.row, projected.num_heads + item.kv_head);
            }
        }
        complete_tile<D>(slot, start, item.begin, item.end, (values ? projected.values : projected.keys) + index, scale,
                         stored);
    }

    __device__ void load_queries(KvSoftmax<D>& softmax, const KvItem& item) const {
        const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const int32_t first_head = rows.first_head_of(item), heads = rows.heads_of(item);
        const int64_t head = static_cast<int64_t>(item.row) * projected.num_heads + first_head + g;
        const auto* from = reinterpret_cast<const uint4*>(projected.queries + head * D) + t;
#pragma unroll
        for (int32_t j = 0; j < D / 32; ++j) {
            softmax.query[j] = make_uint4(0, 0, 0, 0);
            if (g < heads) {
                softmax.query[j] = ptx::load_l2(from + 4 * j);
            }
        }
        const auto scale_of = [&](int32_t i) {
            const float scale = projected.scale * 1.44269504f; // log2(e)
            return i < heads ? scale * norm_scale<D>(projected, item.row, first_head + i) : 0.0f;
        };
        softmax.scale = make_float2(scale_of(2 * t), scale_of(2 * t + 1));
    }
};

} // namespace fuseline
