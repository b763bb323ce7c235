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
            const f32v x = load(block + i), size = (f32v)((u32v)x & 0x7fffffffu);
            largest_ = size > largest_ ? size : largest_;
            poison_ += x * 0.0f;
        }
    }

    // The largest magnitude by 127; 0 where rounding to its multiples would overflow, NaN if a value was not finite.
    float scale() const {
        float largest = 0.0f, poison = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) {
            largest = largest_[lane] > largest ? largest_[lane] : largest;
            poison += poison_[lane];
        }
        return (largest < kTiny ? 0.0f : largest / 127.0f) + poison;
    }

  private:
    f32v largest_{}, poison_{};
};

inline float inverse(float scale) {
    return scale == 0.0f ? 0.0f : 1.0f / scale;
}

// A block times inverse, rounded to the nearest integers, ties to even, within [-127, 127]; returns their sum.
template <class Integer>
int32_t round_block(const float* block, float inverse, Integer* to) {
    alignas(64) int32_t rounded[kBlock];
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        f32v x = load(block + i) * inverse;
        x = x > -127.0f ? x : splat(-127.0f); // NaN too
        x = x < 127.0f ? x : splat(127.0f);
        // Beyond 2^23 floats are integers, so adding it rounds.
        x = (x + 0x1.8p23f) - 0x1.8p23f;
        const i32v integers = __builtin_convertvector(x, i32v);
        std::memcpy(rounded + i, &integers, sizeof integers);
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
        to[i] = Integer(rounded[i]);
        sum += rounded[i];
    }
    return sum;
}

} // namespace fuseline
