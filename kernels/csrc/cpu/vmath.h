// What attention and the small pieces of a layer compute with, beyond isa.h: exp, four sums at once, and rounding to
// the dtypes of the KV cache. Like there, a result depends on its operands and the level only, never on its lane.
#pragma once

#include <cmath>
#include <limits>

#include "isa.h"

namespace fuseline {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

inline f32v maximum(f32v a, f32v b) {
    return a > b ? a : b;
}

inline float max_lane(f32v value) {
    float best = value[0];
    for (int lane = 1; lane < kLanes; ++lane)
        best = value[lane] > best ? value[lane] : best;
    return best;
}

// e^x to 2 ulp: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (the coefficients of Cephes' expf). 0 below
// the smallest normal result, exactly 1 at 0, infinity above 88.37, NaN for NaN.
inline f32v exp(f32v x) {
    const f32v shifted = fma(x, splat(1.44269504088896341f), splat(0x1.8p23f)); // rounds to an integer in the low bits
    const f32v n = shifted - 0x1.8p23f;
    const f32v r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    f32v p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    const u32v power = ((u32v)shifted + 127u) << 23; // 2^n
    const f32v result = p * (f32v)power;
    const f32v bounded = x < splat(-87.33f) ? f32v{} : result;
    return x > splat(88.37f) ? splat(kInfinity) : bounded;
}

inline float exp(float x) {
    return exp(splat(x))[0];
}

// hsum of four vectors, each in hsum's order, to four floats.
inline void hsum4(const f32v (&sums)[4], float* to) {
#if defined(__SSE3__)
    __m128 quarter[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)sums[i]),
                                          _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)sums[i], 1)));
        quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
        const __m256 whole = (__m256)sums[i];
        quarter[i] = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
#else
        quarter[i] = (__m128)sums[i];
#endif
    }
    const __m128 low = _mm_hadd_ps(quarter[0], quarter[1]), high = _mm_hadd_ps(quarter[2], quarter[3]);
    _mm_storeu_ps(to, _mm_hadd_ps(low, high));
#else
    for (int i = 0; i < 4; ++i)
        to[i] = hsum(sums[i]);
#endif
}

// Rounds to the nearest, ties to even, as torch does.
inline void narrow(float value, float& to) {
    to = value;
}
inline void narrow(float value, bf16& to) {
    to.bits = to_bf16_bits(value);
}
inline void narrow(float value, f16& to) {
#if defined(__F16C__)
    to.bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00; // NaN
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00; // 65520 and more round to infinity
    } else if (magnitude < 0x38800000) {
        // Below 2^-14: adding 0.5 makes the addition itself round to multiples of 2^-24, the spacing there.
        const float shifted = std::fabs(value) + 0.5f;
        std::memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000;
    } else {
        half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    }
    to.bits = uint16_t(half | sign);
#endif
}

} // namespace fuseline
