// How the kernels of float weights take the columns of a row.
#pragma once

#include "isa.h"

namespace fuseline {

// Elements of a row of W that are taken at once along cols, and how they become vectors: for bf16 the even ones, then
// the odd, since a vector of bf16 read as 32-bit integers is widened by a shift and a mask, without a shuffle. So
// element kElements * i + e falls to lane e / kVectors.
template <class T>
struct Step {
    static constexpr int kVectors = 1;
    static constexpr int kElements = kLanes;
    static f32v vector(const T* from, int) { return load(from); }
};

template <>
struct Step<bf16> {
    static constexpr int kVectors = 2;
    static constexpr int kElements = 2 * kLanes;
    static f32v vector(const bf16* from, int odd) {
        const u32v pairs = load_bytes<u32v>(from);
        return odd ? (f32v)(pairs & 0xffff0000u) : (f32v)(pairs << 16);
    }
};

// Cols, made up to whole steps.
template <class T>
int64_t packed_cols(int64_t cols) {
    constexpr int64_t step = Step<T>::kElements;
    return (cols + step - 1) / step * step;
}

} // namespace fuseline
