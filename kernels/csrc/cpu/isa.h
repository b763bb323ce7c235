// What the level this file is compiled for computes with: one vector of floats, its arithmetic, and how weights and KV
// of each dtype are widened into it. The level is the compiler's flags; kernels/cpu/library.py chooses them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSELINE_EXPORT __attribute__((visibility("default")))

namespace fuseline {

// FUSELINE_EMULATE_WIDE: vectors of AVX-512's size on any CPU, to test what depends on it.
#if defined(__AVX512F__) || defined(FUSELINE_EMULATE_WIDE)
#define FUSELINE_WIDE_VECTORS 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

// One vector of floats, of 32-bit integers. Indexing, + - * / and comparisons are the compiler's.
typedef float f32v __attribute__((vector_size(kVectorBytes)));
typedef uint32_t u32v __attribute__((vector_size(kVectorBytes)));
typedef int32_t i32v __attribute__((vector_size(kVectorBytes)));

// 16-bit floats as they lie in memory.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline f32v splat(float value) {
    return value - f32v{};
}

template <class V>
inline V load_bytes(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value); // one unaligned load
    return value;
}

inline f32v load(const float* from) {
    return load_bytes<f32v>(from);
}
inline void store(float* to, f32v value) {
    std::memcpy(to, &value, sizeof value);
}

// a * b + c, rounded once where the level has the instruction and twice where not.
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// sum = fma(a, b, sum), for loops that keep as many sums as there are registers: said in these words, the compiler
// neither copies nor spills them.
inline void accumulate(f32v& sum, f32v a, f32v b) {
#if defined(__AVX512F__) || defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum = fma(a, b, sum);
#endif
}

inline float widen(float value) {
    return value;
}
inline float widen(int8_t value) {
    return value;
}
inline float widen(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float widen(f16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    // Exponent and mantissa in place, scaled by 2^112; infinity and NaN, whose exponents are all ones, apart.
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = uint32_t(value.bits & 0x7fff) << 13;
    float result;
    std::memcpy(&result, &rest, sizeof result);
    result *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &result, sizeof bits);
    bits = (rest >= 0x0f800000 ? (rest | 0x7f800000) : bits) | sign;
    std::memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

// kLanes consecutive halves as integers.
inline u32v load_halves(const void* from) {
    typedef uint16_t u16v __attribute__((vector_size(kVectorBytes / 2)));
    return __builtin_convertvector(load_bytes<u16v>(from), u32v);
}

// kLanes consecutive elements, widened exactly.
inline f32v load(const bf16* from) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (f32v)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (f32v)_mm256_slli_epi32(wide, 16);
#else
    return (f32v)(load_halves(from) << 16);
#endif
}

inline f32v load(const f16* from) {
#if defined(__AVX512F__)
    // The masked form, since GCC warns of the other.
    return (f32v)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__) && defined(__AVX2__)
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    const u32v bits = load_halves(from);
    const u32v sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    const u32v scaled = (u32v)((f32v)rest * 0x1p112f);
    const u32v special = (u32v)(rest >= 0x0f800000u);
    return (f32v)((special & (rest | 0x7f800000u)) | (~special & scaled) | sign);
#endif
}

inline f32v load(const int8_t* from) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    typedef int8_t i8v __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(load_bytes<i8v>(from), f32v);
#endif
}

// Rounds to the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef float f32x4 __attribute__((vector_size(16)));

// Halves added onto each other down to four lanes.
inline f32x4 fold(f32v value) {
#if defined(FUSELINE_WIDE_VECTORS)
    typedef float f32x8 __attribute__((vector_size(32)));
    const f32x8 eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    const f32v eight = value;
#endif
#if defined(FUSELINE_WIDE_VECTORS) || defined(__AVX2__)
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
    return value;
#endif
}

// The sum of the lanes, in one fixed order: fold, then (0 + 1) + (2 + 3).
inline float hsum(f32v value) {
    const f32x4 four = fold(value);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// The hsum of each of four, to the bit, in fewer operations.
inline f32x4 hsum(f32v a, f32v b, f32v c, f32v d) {
    const f32x4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    const f32x4 ab_low = __builtin_shufflevector(fa, fb, 0, 4, 1, 5),
                ab_high = __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
    const f32x4 cd_low = __builtin_shufflevector(fc, fd, 0, 4, 1, 5),
                cd_high = __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
    return (__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5) + __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7)) +
           (__builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5) +
            __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

} // namespace fuseline
