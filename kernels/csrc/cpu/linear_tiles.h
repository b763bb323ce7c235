// Linear layers over bf16 weights by AMX, which rounds x to bf16: what linear.cpp hands on to where there are tiles.
#pragma once

#include "linear.h"
#include "tiles.h"

namespace fuseline {

// Whether bf16 weights are multiplied here; the same for the process's life.
inline bool tiles_take_bf16() {
#ifdef FUSELINE_TILES
    return Tiles::usable();
#else
    return false;
#endif
}

// As packed_bytes, pack_input and linear, for rows [rows.begin, rows.end) of W.
int64_t tiles_packed_bytes(int64_t cols, int64_t m);
void pack_tiles(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed);
void multiply_tiles(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride);

} // namespace fuseline
