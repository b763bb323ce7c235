// Linear layers over quantised weights: what linear.cpp hands on to. The formats and layouts are defined in
// kernels/quantized.py: panels of kPanelRows rows, which a kernel reads from the first byte to the last.
//
// x is rounded to 8 bits when it is packed. Sums of integers are exact, so a row's result does not depend on how rows
// are taken together; floats are added in one order. x that is not finite makes its own row NaN, and no other.
#pragma once

#include "isa.h"
#include "linear.h"

namespace fuseline {

constexpr int64_t kPanelRows = 16;
// Columns of x that share a scale where weights are of 4 bits.
constexpr int64_t kBlock = 32;

// As packed_bytes, pack_input and linear, but for rows [rows.begin, rows.end), which start with a panel.
int64_t int8_packed_bytes(int64_t cols, int64_t m);
void pack_int8(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed);
void multiply_int8(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride);

int64_t int4_packed_bytes(int64_t cols, int64_t m);
void pack_int4(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed);
void multiply_int4(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride);

inline int64_t whole(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

// What is smaller than this is rounded to zero: its scale's inverse might overflow.
constexpr float kTiny = 1e-30f;

// --- rounding x -------------------------------------------------------------------------------------------------

// A row of x in blocks of kBlock values, in the order of the weight's columns, zeros behind the last.
class RowBlocks {
  public:
    RowBlocks(const float* x, const LinearWeight& weight) : x_(x), order_(weight.order), cols_(weight.cols) {}

    // Valid until the next call.
    const float* at(int64_t col) {
        if (order_ == nullptr && col + kBlock <= cols_)
            return x_ + col;
        for (int64_t i = 0; i < kBlock; ++i)
            buffer_[i] = col + i >= cols_ ? 0.0f : x_[order_ == nullptr ? col + i : order_[col + i]];
        return buffer_;
    }

  private:
    const float* x_;
    const int32_t* order_;
    int64_t cols_;
    float buffer_[kBlock];
};

// What blocks have in common that are rounded by one scale.
class Extent {
  public:
    void take(const float* block) {
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            // Magnitudes as integers are in the same order, and what is not finite comes after all others.
            const i32v size = load_bytes<i32v>(block + i) & 0x7fffffff;
            largest_ = size > largest_ ? size : largest_;
        }
    }

    // The largest magnitude by 127; 0 where rounding to its multiples would overflow, NaN if a value was not finite.
    float scale() const {
        int32_t bits = 0;
        for (int lane = 0; lane < kLanes; ++lane)
            bits = std::max(bits, largest_[lane]);
        const float largest = load_bytes<float>(&bits);
        return (largest < kTiny ? 0.0f : largest / 127.0f) + largest * 0.0f;
    }

  private:
    i32v largest_{};
};

inline float inverse(float scale) {
    return scale == 0.0f ? 0.0f : 1.0f / scale;
}

// kBlock integers that fit a byte.
inline void store_bytes(const u32v* integers, int8_t* to) {
#if defined(__AVX2__) && !defined(FUSELINE_WIDE_VECTORS)
    const auto* from = reinterpret_cast<const __m256i*>(integers);
    const __m256i low = _mm256_packs_epi32(from[0], from[1]), high = _mm256_packs_epi32(from[2], from[3]);
    // Packing goes by halves of vectors; fours of bytes are put in order again.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    std::memcpy(to, &bytes, sizeof bytes);
#else
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Bytes bytes = __builtin_convertvector(integers[i / kLanes], Bytes);
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
#endif
}

// A block times inverse, which is at most 127, rounded to the nearest integers, ties to even; returns their sum. Of
// what is not finite they are any integers.
inline int32_t round_block(const float* block, float inverse, int8_t* to) {
    u32v integers[kBlock / kLanes], sums{};
    for (u32v& some : integers) {
        // Beyond 2^23 floats are integers, so adding 1.5 * 2^23 rounds, and leaves the integer in the last bits.
        some = (u32v)(load(block) * inverse + 0x1.8p23f) - 0x4b400000u;
        sums += some;
        block += kLanes;
    }
    store_bytes(integers, to);
    uint32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        sum += sums[lane];
    return int32_t(sum);
}

} // namespace fuseline
