// What happens to a sum of the QKV projection: bias, weight of the head norm, rotary embedding, and where it goes.
//
// Units of a head hold rows d = 8j + g and d + D/2, so that a lane has both elements that the rotation mixes. A head's
// norm scales all its elements alike, which commutes with the rotation: only the sums of squares go along, and whoever
// reads the head scales it.
#pragma once

#include "activations.cuh"
#include "api.h"
#include "paged_attention.cuh"

namespace fuseline {

__device__ inline float bf16_or(const uint16_t* values, uint32_t i, float otherwise) {
    return values == nullptr ? otherwise : ptx::bf16_to_float(values[i]);
}

template <int D>
struct QkvEpilogue {
    const fl_attention_args& args;
    const RowScales& scales;
    const ProjectedRows& out;

    __device__ void operator()(uint32_t unit, int n, const float (&c)[4]) const {
        constexpr uint32_t kUnits = D / 16; // of a head
        const uint32_t head = unit / kUnits, lane = threadIdx.x % 32;
        const uint32_t d = unit % kUnits * 8 + lane / 4;
        const uint32_t num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
        const bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
        const float low_bias = bf16_or(args.qkv_bias, head * D + d, 0.0f);
        const float high_bias = bf16_or(args.qkv_bias, head * D + d + D / 2, 0.0f);
        scales.wait();
        float low[2], high[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t token = min(8 * n + lane % 4 * 2 + i, static_cast<uint32_t>(args.batch) - 1);
            const float scale = scales.scale(token, args.hidden, args.eps);
            low[i] = c[i] * scale + low_bias;
            high[i] = c[2 + i] * scale + high_bias;
        }
        if (args.q_norm != nullptr && !is_value) {
            const float2 squares = reduce_rows(
                make_float2(low[0] * low[0] + high[0] * high[0], low[1] * low[1] + high[1] * high[1]), false);
            const uint16_t* norm = is_query ? args.q_norm : args.k_norm;
            const float low_norm = bf16_or(norm, d, 1.0f), high_norm = bf16_or(norm, d + D / 2, 1.0f);
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t token = 8 * n + lane % 4 * 2 + i;
                if (lane < 4 && token < static_cast<uint32_t>(args.batch)) {
                    out.squares[(token * (num_heads + num_kv_heads) + head) * kUnits + unit % kUnits] =
                        i == 0 ? squares.x : squares.y;
                }
                low[i] *= low_norm;
                high[i] *= high_norm;
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t token = 8 * n + lane % 4 * 2 + i;
            if (token >= static_cast<uint32_t>(args.batch)) {
                continue;
            }
            float* values = out.values + (token * num_kv_heads + head - num_heads - num_kv_heads) * D + d;
            if (is_value) {
                values[0] = low[i];
                values[D / 2] = high[i];
                continue;
            }
            const float cos = args.rotary_cos[token * (D / 2) + d], sin = args.rotary_sin[token * (D / 2) + d];
            const float x = low[i] * cos - high[i] * sin, y = high[i] * cos + low[i] * sin;
            if (is_query) {
                uint16_t* queries = out.queries + (token * num_heads + head) * D + d;
                queries[0] = ptx::float_to_bf16(x);
                queries[D / 2] = ptx::float_to_bf16(y);
            } else {
                float* keys = out.keys + (token * num_kv_heads + head - num_heads) * D + d;
                keys[0] = x;
                keys[D / 2] = y;
            }
        }
    }
};

} // namespace fuseline
