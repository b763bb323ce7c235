// Linear layers: y = x W^T + bias, with W as the checkpoint has it, row-major [rows, cols], or quantised, in panels.
//
// The input is packed once (pack_input), at the end of whatever computed it, and may then feed any number of linears
// whose weights have the same dtype and cols. Batch-invariant: for each element of y the operations and their order
// depend on cols, the dtype and the level this library was compiled for, never on m, the row's position or the number
// of workers.
#pragma once

#include <cstdint>

#include "team.h"

namespace fuseline {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4 };

// Mirrored by kernels/cpu/linear.py.
struct LinearWeight {
    const void* data; // [rows, cols], read-only; only the elements themselves are read, never past a row's end
    int64_t rows;
    int64_t cols;
    int64_t row_stride; // in elements
    const float* bias;  // [rows], or null
    // Of quantised weights only, else null or 0; the layouts are those of kernels/quantized.py.
    const void* scales;
    const void* zeros;    // of i4, or null
    const int32_t* order; // [cols], which column of x each column takes, or null
    int64_t group;        // of i4
    DType dtype;
    int32_t reserved; // 0
};

// Bytes that the packed form of m rows takes; keep it 64-byte aligned.
int64_t packed_bytes(const LinearWeight& weight, int64_t m);

// Packs rows [rows.begin, rows.end) of the m rows x[m, cols]. Any worker may pack any rows; a barrier must lie between
// packing and linear. Serves all weights of this weight's dtype, cols and order.
void pack_input(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed);

// y[m, all rows of the parts one under the other] = packed input times each part, plus its bias: this worker's part.
// The parts have one dtype and one number of cols (for example Q, K and V as they lie in the checkpoint). No barrier
// inside; one must follow before others read y, or before the next linear.
void linear(const Worker& worker, const LinearWeight* parts, int num_parts, const void* packed, int64_t m, float* y,
            int64_t y_stride);

} // namespace fuseline
