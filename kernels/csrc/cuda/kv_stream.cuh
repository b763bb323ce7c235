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
    int64_t values;              // elements from a key to its value
    const int32_t* block_tables; // [batch, table_width]
    int32_t table_width, num_kv_heads;
    int32_t block_bits; // log2 of block_size

    __device__ int32_t block_of(int32_t row, int32_t token) const {
        return block_tables[static_cast<int64_t>(row) * table_width + (token >> block_bits)];
    }
    // Where a token's key is, in keys of D elements.
    __device__ int64_t place_of(int32_t block, int32_t kv_head, int32_t token) const {
        const int64_t first = (static_cast<int64_t>(block) * num_kv_heads + kv_head) << block_bits;
        return first + (token & ((1 << block_bits) - 1));
    }
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

// The KV pieces of warp `index` of a cluster, in the order in which it computes: for every tile keys, then values.
template <int D>
class KvSource {
  public:
    using Tile = KvTile<D>;

    __device__ KvSource(const KvWalk& walk, const KvCache& cache, int32_t index)
        : walk_(walk), cache_(cache), index_(index) {
        advance();
    }

    __device__ bool issue(Ring& ring) {
        if (!more_) {
            return false;
        }
        const int32_t lane = threadIdx.x % 32, start = tile_ * Tile::kTokens;
        if (lane == 0) {
            const int32_t tokens = min(start + Tile::kTokens, stored_end_) - max(start, begin_);
            ptx::mbarrier_arrive_expect_tx(ring.next_barrier(), max(tokens, 0) * Tile::kRowBytes);
        }
        const int32_t from = chunk_begin(), tokens = chunk_end() - from;
        if (lane < ATTN_CHUNKS && tokens > 0) {
            const int32_t skipped = from - start - lane * Tile::kChunkTokens;
            ptx::bulk_load_hint(ring.next_slot() + lane * ATTN_CHUNK_PITCH + skipped * Tile::kRowBytes,
                                cache_.keys + cache_.place_of(block_, kv_head_, from) * D +
                                    (values_ ? cache_.values : 0),
                                tokens * Tile::kRowBytes, ring.next_barrier(), ptx::evict_first_policy());
        }
        ring.issued();
        if (values_) {
            advance();
        }
        values_ = !values_;
        return true;
    }

  private:
    // The tokens of this lane's chunk of the tile that are to be copied.
    __device__ int32_t chunk_begin() const {
        return max(tile_ * Tile::kTokens + static_cast<int32_t>(threadIdx.x % 32) * Tile::kChunkTokens, begin_);
    }
    __device__ int32_t chunk_end() const {
        return min(tile_ * Tile::kTokens + static_cast<int32_t>(threadIdx.x % 32 + 1) * Tile::kChunkTokens,
                   stored_end_);
    }

    // To the next tile; starts to load the number of the block that holds this lane's chunk of it.
    __device__ void advance() {
        tile_ += walk_.work().num_states;
        while (tile_ >= end_tile_) {
            ++epoch_;
            if (!walk_.has(epoch_)) {
                more_ = false;
                return;
            }
            const KvItem item = walk_.item(epoch_);
            tile_ = walk_.first_tile(item, epoch_, index_);
            end_tile_ = item.end_tile;
            row_ = item.row;
            kv_head_ = item.kv_head;
            begin_ = item.begin;
            stored_end_ = item.end - 1;
        }
        if (threadIdx.x % 32 < ATTN_CHUNKS && chunk_begin() < chunk_end()) {
            block_ = cache_.block_of(row_, chunk_begin());
        }
    }

    KvWalk walk_;
    const KvCache& cache_;
    int32_t index_, epoch_ = -1;
    int32_t tile_ = 0, end_tile_ = 0, row_ = 0, kv_head_ = 0, begin_ = 0, stored_end_ = 0, block_ = 0;
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
#pragma unroll 1 // seldom run
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
