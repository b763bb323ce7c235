// Brings KV tiles into a warp's ring, and puts a row's new token in its place.
//
// A tile is 4 chunks of 1 KB of one KV head's tokens, each inside one KV block, laid 32 bytes apart in the slot. Only
// tokens that the row sees are copied, and the newest not: the same kernel computes it, so a tile may be on its way
// before it exists.
#pragma once

#include "kv_split.cuh"
#include "ring.cuh"

namespace fuseline {

// One layer's cache, [2, num_blocks, num_kv_heads, block_size, D], and who owns its blocks.
struct KvCache {
    uint16_t* keys;
    int64_t values;                                       // elements from a key to its value
    const int32_t* block_tables;                          // [batch, table_width]
    int32_t table_width, num_kv_heads, block_size, parts; // parts: groups of query heads per KV head
};

template <int D>
struct KvTile {
    static constexpr int32_t kRowBytes = 2 * D;
    static constexpr int32_t kTokens = ATTN_TILE_BYTES / kRowBytes;
    static constexpr int32_t kChunkTokens = kTokens / ATTN_CHUNKS;
    static constexpr int32_t kFragments = kTokens / 16; // of 16 tokens, for mma

    // Fragment row i is a token chosen so that the 8 lanes of a load's phase hit different banks, for keys (4 lanes a
    // row, two rows) and for values (row pairs 2t, 2t + 1 in 4 chunks) alike. `pair` is i / 2 % 4, `odd` i % 2, `upper`
    // whether i >= 8.
    static __device__ int32_t chunk_of(int32_t pair, int32_t odd) { return (pair + 2 * odd) & 3; }
    static __device__ int32_t token_in_chunk(int32_t fragment, int32_t odd, int32_t upper) {
        return 4 * fragment + odd + 2 * upper;
    }
};

// The KV pieces of one warp, in the order in which it computes: for every item and tile keys, then values.
template <int D>
class KvSource {
  public:
    using Tile = KvTile<D>;

    __device__ KvSource(const KvWalk<D>& walk, const KvCache& cache, int32_t index, int32_t num_states, uint64_t policy)
        : walk_(walk), cache_(cache), index_(index), num_states_(num_states), policy_(policy) {
        walk_.end_tile = 0;
        tile_ = 0;
        advance();
    }

    __device__ bool issue(Ring& ring) {
        if (!more_) {
            return false;
        }
        const int32_t lane = threadIdx.x % 32;
        const int32_t stored_end = walk_.end - 1;
        const int32_t start = tile_ * Tile::kTokens;
        if (lane < ATTN_CHUNKS) {
            if (lane == 0) {
                const int32_t tokens = min(start + Tile::kTokens, stored_end) - max(start, walk_.begin);
                ptx::mbarrier_arrive_expect_tx(ring.next_barrier(), max(tokens, 0) * Tile::kRowBytes);
            }
            const int32_t chunk_start = start + lane * Tile::kChunkTokens;
            const int32_t from = max(chunk_start, walk_.begin);
            const int32_t tokens = min(chunk_start + Tile::kChunkTokens, stored_end) - from;
            if (tokens > 0) {
                const int64_t token = row_of_block() + from % cache_.block_size;
                ptx::bulk_load_hint(ring.next_slot() + lane * ATTN_CHUNK_PITCH + (from - chunk_start) * Tile::kRowBytes,
                                    cache_.keys + token * D + (values_ ? cache_.values : 0), tokens * Tile::kRowBytes,
                                    ring.next_barrier(), policy_);
            }
        }
        ring.issued();
        if (values_) {
            advance();
        }
        values_ = !values_;
        return true;
    }

  private:
    // Where this lane's block and KV head start, in tokens of the cache.
    __device__ int64_t row_of_block() const {
        return (static_cast<int64_t>(block_) * cache_.num_kv_heads + walk_.group / cache_.parts) * cache_.block_size;
    }

    // To the next tile, and starts to load the block that this lane's chunk of it is in.
    __device__ void advance() {
        tile_ += num_states_;
        while (tile_ >= walk_.end_tile) {
            if (!walk_.next()) {
                more_ = false;
                return;
            }
            tile_ = walk_.first_tile_of(walk_.state_of(index_, num_states_), num_states_);
        }
        const int32_t chunk_start = tile_ * Tile::kTokens + static_cast<int32_t>(threadIdx.x % 32) * Tile::kChunkTokens;
        const int32_t from = max(chunk_start, walk_.begin);
        const int32_t to = min(chunk_start + Tile::kChunkTokens, walk_.end - 1);
        if (threadIdx.x % 32 < ATTN_CHUNKS && from < to) {
            block_ =
                cache_.block_tables[static_cast<int64_t>(walk_.row) * cache_.table_width + from / cache_.block_size];
        }
    }

    KvWalk<D> walk_;
    const KvCache& cache_;
    int32_t index_, num_states_;
    uint64_t policy_;
    int32_t tile_, block_ = 0;
    bool values_ = false, more_ = true;
};

// Makes a tile that lies at an edge of what the row sees whole: `newest` float[D] becomes its last token, and the
// others that it does not see become zeros. Where `stored` is not null the newest token is written there too. All lanes
// of the warp, before they read the tile.
template <int D>
__device__ inline void complete_tile(unsigned char* slot, int32_t start, int32_t begin, int32_t end,
                                     const float* newest, float scale, uint16_t* stored) {
    using Tile = KvTile<D>;
    constexpr int32_t kPieces = Tile::kRowBytes / 16;
    for (int32_t i = threadIdx.x % 32; i < Tile::kTokens * kPieces; i += 32) {
        const int32_t token = i / kPieces, piece = i % kPieces;
        if (start + token >= begin && start + token < end - 1) {
            continue;
        }
        uint4 values = make_uint4(0, 0, 0, 0);
        if (start + token == end - 1) {
            const float4 a = ptx::load_l2(reinterpret_cast<const float4*>(newest + 8 * piece));
            const float4 b = ptx::load_l2(reinterpret_cast<const float4*>(newest + 8 * piece + 4));
            values = make_uint4(ptx::pack_bf16x2(a.x * scale, a.y * scale), ptx::pack_bf16x2(a.z * scale, a.w * scale),
                                ptx::pack_bf16x2(b.x * scale, b.y * scale), ptx::pack_bf16x2(b.z * scale, b.w * scale));
            if (stored != nullptr) {
                *reinterpret_cast<uint4*>(stored + 8 * piece) = values;
            }
        }
        const int32_t chunk = token / Tile::kChunkTokens, inside = token % Tile::kChunkTokens;
        *reinterpret_cast<uint4*>(slot + chunk * ATTN_CHUNK_PITCH + inside * Tile::kRowBytes + 16 * piece) = values;
    }
    ptx::fence_proxy_async(); // the slot's next copies come behind these stores
    __syncwarp();
}

} // namespace fuseline
