// One warp's attention over KV tiles: an online softmax of up to 8 query heads that share a KV head.
//
// With g = lane / 4 and t = lane % 4, a lane holds heads 2t and 2t + 1. Scores are keys times queries, tokens by heads;
// transposed in registers they are the second factor of values times probabilities, head dimensions by heads. Keys,
// queries and values are taken in any order of dimensions and tokens that suits the loads, as long as both factors
// agree. Scores are in powers of two.
#pragma once

#include "kv_stream.cuh"

namespace fuseline {

// Two factors for heads 2t and 2t + 1.
__device__ inline float2 reduce_rows(float2 values, bool largest) {
    for (int32_t distance = 4; distance < 32; distance *= 2) {
        const float x = __shfl_xor_sync(0xffffffffu, values.x, distance);
        const float y = __shfl_xor_sync(0xffffffffu, values.y, distance);
        values.x = largest ? fmaxf(values.x, x) : values.x + x;
        values.y = largest ? fmaxf(values.y, y) : values.y + y;
    }
    return values;
}

__device__ constexpr uint32_t word(const uint4& v, int32_t i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The lower, or the upper, 16 bits of both, the first one's below.
__device__ inline uint32_t lows(uint32_t first, uint32_t second) {
    return (first & 0xffffu) | second << 16;
}
__device__ inline uint32_t highs(uint32_t first, uint32_t second) {
    return first >> 16 | (second & 0xffff0000u);
}

template <int D>
struct KvSoftmax {
    using Tile = KvTile<D>;
    static constexpr int32_t kOutputs = D / 16; // mma tiles of 16 dimensions

    // o[i][0..1] are of this dimension in lane (g, t), o[i][2..3] of the next.
    static __device__ int32_t dimension(int32_t i, int32_t g) { return 64 * (i / 4) + 8 * g + 2 * (i % 4); }

    uint4 query[D / 32]; // of head g: dimensions 32 j + 8 t to 32 j + 8 t + 7
    float2 scale;        // of scores, with log2(e)
    float2 largest, sum; // the sum is over this lane's tokens only
    float o[kOutputs][4];
    uint32_t p[Tile::kFragments][2];

    __device__ void reset() {
        largest = make_float2(-INFINITY, -INFINITY);
        sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int32_t i = 0; i < kOutputs; ++i) {
            o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
        }
    }

    // Takes a tile's keys: p becomes its probabilities. Tokens outside [begin, end) do not count; `start` is the tile's
    // first token.
    __device__ void take_keys(const unsigned char* slot, int32_t start, int32_t begin, int32_t end) {
        const int32_t g = threadIdx.x % 32 / 4;
        float s[Tile::kFragments][4];
        multiply_keys(slot, s);
        float2 top = largest;
#pragma unroll
        for (int32_t f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
            for (int32_t upper = 0; upper < 2; ++upper) {
                const int32_t token =
                    start + Tile::chunk_of(g / 2, g % 2) * Tile::kChunkTokens + Tile::token_in_chunk(f, g % 2, upper);
                const bool seen = token >= begin && token < end;
                s[f][2 * upper] = seen ? s[f][2 * upper] * scale.x : -INFINITY;
                s[f][2 * upper + 1] = seen ? s[f][2 * upper + 1] * scale.y : -INFINITY;
                top.x = fmaxf(top.x, s[f][2 * upper]);
                top.y = fmaxf(top.y, s[f][2 * upper + 1]);
            }
        }
        top = reduce_rows(top, true);
        rescale(top);
#pragma unroll
        for (int32_t f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
            for (int32_t upper = 0; upper < 2; ++upper) {
                const float x = ptx::exp2_approx(s[f][2 * upper] - top.x);
                const float y = ptx::exp2_approx(s[f][2 * upper + 1] - top.y);
                sum.x += x;
                sum.y += y;
                p[f][upper] = ptx::transpose_8x8(ptx::pack_bf16x2(x, y));
            }
        }
    }

    // Adds the tile's values, weighted by p.
    __device__ void take_values(const unsigned char* slot) {
        const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int32_t f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
            for (int32_t column = 0; column < D / 64; ++column) {
                uint4 v[4]; // 8 dimensions of tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of the fragment
#pragma unroll
                for (int32_t n = 0; n < 4; ++n) {
                    const int32_t token = Tile::token_in_chunk(f, n % 2, n / 2);
                    v[n] = *reinterpret_cast<const uint4*>(slot + Tile::chunk_of(t, n % 2) * ATTN_CHUNK_PITCH +
                                                           token * Tile::kRowBytes + 16 * g + 128 * column);
                }
#pragma unroll
                for (int32_t i = 0; i < 4; ++i) {
                    const uint32_t w[4] = {word(v[0], i), word(v[1], i), word(v[2], i), word(v[3], i)};
                    ptx::mma_bf16(o[4 * column + i],
                                  {lows(w[0], w[1]), highs(w[0], w[1]), lows(w[2], w[3]), highs(w[2], w[3])}, p[f]);
                }
            }
        }
    }

  private:
    __device__ void multiply_keys(const unsigned char* slot, float (&s)[Tile::kFragments][4]) const {
        const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int32_t f = 0; f < Tile::kFragments; ++f) {
            const unsigned char* lower = slot + Tile::chunk_of(g / 2, g % 2) * ATTN_CHUNK_PITCH +
                                         Tile::token_in_chunk(f, g % 2, 0) * Tile::kRowBytes + 16 * t;
            const unsigned char* upper = lower + 2 * Tile::kRowBytes;
            float odd[4] = {}; // two chains of mma are half as long as one
            s[f][0] = s[f][1] = s[f][2] = s[f][3] = 0.0f;
#pragma unroll
            for (int32_t j = 0; j < D / 32; ++j) {
                const uint4 a = *reinterpret_cast<const uint4*>(lower + 64 * j);
                const uint4 b = *reinterpret_cast<const uint4*>(upper + 64 * j);
                ptx::mma_bf16(s[f], {a.x, b.x, a.y, b.y}, {query[j].x, query[j].y});
                ptx::mma_bf16(odd, {a.z, b.z, a.w, b.w}, {query[j].z, query[j].w});
            }
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
                s[f][i] += odd[i];
            }
        }
    }

    __device__ void rescale(float2 top) {
        const float2 factor = make_float2(ptx::exp2_approx(largest.x - top.x), ptx::exp2_approx(largest.y - top.y));
        largest = top;
        sum.x *= factor.x;
        sum.y *= factor.y;
#pragma unroll
        for (int32_t i = 0; i < kOutputs; ++i) {
            o[i][0] *= factor.x;
            o[i][1] *= factor.y;
            o[i][2] *= factor.x;
            o[i][3] *= factor.y;
        }
    }
};

} // namespace fuseline
