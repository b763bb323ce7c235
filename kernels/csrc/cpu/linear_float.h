// Linear layers over float weights: what linear.cpp hands on to.
#pragma once

#include "isa.h"
#include "linear.h"

namespace fuseline {

// Workers take rows of W in multiples of this, which are whole blocks and tiles of every kernel.
constexpr int64_t kFloatGrain = kVectorBytes == 64 ? 96 : 48;

// As packed_bytes, pack_input and linear, for T = float, bf16, f16 and rows [rows.begin, rows.end) of W.
template <class T>
int64_t float_packed_bytes(int64_t cols, int64_t m);
template <class T>
void pack_float(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed);
template <class T>
void multiply_float(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride);

// Rows of x from which on it pays to transpose W.
constexpr int64_t kManyRows = 96;

// The same where m >= kManyRows, in linear_float_many.cpp; padded_cols are the packed_cols of T.
int64_t many_packed_floats(int64_t padded_cols, int64_t m);
template <class T>
void pack_many(int64_t cols, const float* x, int64_t x_stride, int64_t m, Range rows, float* packed);
template <class T>
void multiply_many(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y, int64_t y_stride);

} // namespace fuseline
