// One instruction, under one name: sums of four products of bytes, as AVX512-VNNI and AVX-VNNI have it.
//
// FUSELINE_EMULATE_DOT4 compiles the kernels that are made of it for any CPU, to test them where it is missing.
#pragma once

#include "isa.h"

#if defined(FUSELINE_EMULATE_DOT4) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define FUSELINE_DOT4 1
#endif

#ifdef FUSELINE_DOT4
namespace fuseline {

#if defined(__AVX512VNNI__) || defined(FUSELINE_EMULATE_DOT4)
constexpr int kDotBytes = 64;
#else
constexpr int kDotBytes = 32;
#endif
constexpr int kDotLanes = kDotBytes / 4;

typedef int32_t i32d __attribute__((vector_size(kDotBytes)));
typedef uint16_t u16d __attribute__((vector_size(kDotBytes)));
typedef float f32d __attribute__((vector_size(kDotBytes)));

// sum + a[0] b[0] + ... + a[3] b[3] in each of the lanes; a unsigned, b signed, no sum in between is cut off.
inline i32d dot4(i32d sum, i32d a, i32d b) {
#if defined(FUSELINE_EMULATE_DOT4)
    uint8_t left[kDotBytes];
    int8_t right[kDotBytes];
    std::memcpy(left, &a, sizeof left);
    std::memcpy(right, &b, sizeof right);
    for (int i = 0; i < kDotBytes; ++i)
        sum[i / 4] += int32_t(left[i]) * right[i];
    return sum;
#elif defined(__AVX512VNNI__)
    return (i32d)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return (i32d)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
}

// Four bytes, in every lane.
inline i32d splat_bytes(const void* from) {
    return load_bytes<int32_t>(from) - i32d{};
}

inline f32d fma_dot(f32d a, f32d b, f32d c) {
#if defined(FUSELINE_EMULATE_DOT4)
    return a * b + c;
#else
    static_assert(kDotBytes == kVectorBytes);
    return (f32d)fma((f32v)a, (f32v)b, (f32v)c);
#endif
}

} // namespace fuseline
#endif
