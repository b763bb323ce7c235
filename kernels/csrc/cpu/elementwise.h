// The small pieces of a layer, a row or a head at a time: norms, rotary embedding, KV append, SwiGLU, embedding.
// Row by row, so that a row's result cannot depend on the others.
#pragma once

#include <algorithm>

#include "attention.h"
#include "vmath.h"

namespace fuseline {

// The sum of squares of x[0, n), in an order that depends on n only.
inline float sum_of_squares(const float* x, int64_t n) {
    f32v sums[4] = {};
    int64_t at = 0;
    for (; at + 4 * kLanes <= n; at += 4 * kLanes)
        for (int i = 0; i < 4; ++i) {
            const f32v value = load(x + at + i * kLanes);
            sums[i] = fma(value, value, sums[i]);
        }
    for (; at < n; at += kLanes) {
        float tail[kLanes] = {};
        std::copy(x + at, x + std::min(at + kLanes, n), tail);
        const f32v value = load(tail);
        sums[0] = fma(value, value, sums[0]);
    }
    return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out[n] = x / sqrt(mean(x^2) + eps) * weight; out may be x.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
    for (int64_t i = 0; i < n; ++i)
        out[i] = x[i] * scale * weight[i];
}

inline void add(float* to, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        to[i] += x[i];
}

// Turns the pairs (i, i + half) of a head in place.
inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i] + low * sin[i];
    }
}

// Cosines and sines of position * inv_freq, times scaling: libm's, which do the same at every place of an array.
inline void cos_sin(int64_t position, const float* inv_freq, float scaling, int64_t half, float* cos, float* sin) {
    for (int64_t i = 0; i < half; ++i) {
        const float angle = float(position) * inv_freq[i];
        cos[i] = std::cos(angle) * scaling;
        sin[i] = std::sin(angle) * scaling;
    }
}

// gate[n] = silu(gate) * up.
inline void silu_and_mul(float* gate, const float* up, int64_t n) {
    const auto piece = [](f32v g, f32v u) { return g / (1.0f + exp(-g)) * u; };
    int64_t at = 0;
    for (; at + kLanes <= n; at += kLanes)
        store(gate + at, piece(load(gate + at), load(up + at)));
    if (at < n) {
        float tail[2][kLanes] = {};
        std::copy(gate + at, gate + n, tail[0]);
        std::copy(up + at, up + n, tail[1]);
        store(tail[0], piece(load(tail[0]), load(tail[1])));
        std::copy_n(tail[0], n - at, gate + at);
    }
}

template <class T>
void narrow_row(const float* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        narrow(from[i], to[i]);
}

// A row of int8 with its scale behind it, see kernels/kv_rows.py.
inline void quantize_row(const float* from, int8_t* to, int64_t n) {
    constexpr uint32_t kNotFinite = 0x7f800000;
    constexpr float kLargest = 127, kToInteger = 0x1.8p23f; // added and taken away it rounds, ties to even
    uint32_t bits = 0;                                      // of the greatest magnitude; those of NaN are the greatest
    for (int64_t i = 0; i < n; ++i) {
        uint32_t magnitude;
        std::memcpy(&magnitude, from + i, sizeof magnitude);
        bits = std::max(bits, magnitude & 0x7fffffff);
    }
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    scale = bits >= kNotFinite ? std::numeric_limits<float>::quiet_NaN() : scale / kLargest;
    if (scale > 0)
        for (int64_t i = 0; i < n; ++i) {
            const float value = from[i] / scale; // beyond 127 where the scale is too small to be exact
            const float bounded = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
            to[i] = int8_t(bounded + kToInteger - kToInteger);
        }
    else
        std::fill_n(to, n, int8_t(0));
    std::memcpy(to + n, &scale, sizeof scale);
}

// Writes one head's key or value into its slot; `element` is of KvLayer::at.
inline void append(const KvLayer& kv, int64_t element, const float* from) {
    switch (kv.dtype) {
    case DType::bf16:
        return narrow_row(from, static_cast<bf16*>(kv.data) + element, kv.head_dim);
    case DType::f16:
        return narrow_row(from, static_cast<f16*>(kv.data) + element, kv.head_dim);
    case DType::i8:
        return quantize_row(from, static_cast<int8_t*>(kv.data) + element, kv.head_dim);
    default:
        return narrow_row(from, static_cast<float*>(kv.data) + element, kv.head_dim);
    }
}

template <class T>
void widen_row(const T* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        to[i] = widen(from[i]);
}

// Row `row` of a table [rows, n], in float32.
inline void embed(const void* table, DType dtype, int64_t row, int64_t stride, int64_t n, float* to) {
    switch (dtype) {
    case DType::bf16:
        return widen_row(static_cast<const bf16*>(table) + row * stride, to, n);
    case DType::f16:
        return widen_row(static_cast<const f16*>(table) + row * stride, to, n);
    default:
        return widen_row(static_cast<const float*>(table) + row * stride, to, n);
    }
}

} // namespace fuseline
