// Linear layers: to each dtype its kernels.
#include "linear.h"

#include "linear_float.h"
#include "linear_quantized.h"

namespace fuseline {

int64_t packed_bytes(const LinearWeight& weight, int64_t m) {
    switch (weight.dtype) {
    case DType::bf16:
        return float_packed_bytes<bf16>(weight.cols, m);
    case DType::f16:
        return float_packed_bytes<f16>(weight.cols, m);
    case DType::i8:
        return int8_packed_bytes(weight.cols, m);
    case DType::i4:
        return int4_packed_bytes(weight.cols, m);
    default:
        return float_packed_bytes<float>(weight.cols, m);
    }
}

void pack_input(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    switch (weight.dtype) {
    case DType::bf16:
        return pack_float<bf16>(weight, x, x_stride, m, rows, packed);
    case DType::f16:
        return pack_float<f16>(weight, x, x_stride, m, rows, packed);
    case DType::i8:
        return pack_int8(weight, x, x_stride, m, rows, packed);
    case DType::i4:
        return pack_int4(weight, x, x_stride, m, rows, packed);
    default:
        return pack_float<float>(weight, x, x_stride, m, rows, packed);
    }
}

void linear(const Worker& worker, const LinearWeight* parts, int num_parts, const void* packed, int64_t m, float* y,
            int64_t y_stride) {
    for (int part = 0; part < num_parts; ++part) {
        const LinearWeight& weight = parts[part];
        const bool quantized = weight.dtype == DType::i8 || weight.dtype == DType::i4;
        const Range rows = share(weight.rows, quantized ? kPanelRows : kFloatGrain, worker);
        switch (weight.dtype) {
        case DType::bf16:
            multiply_float<bf16>(weight, rows, packed, m, y, y_stride);
            break;
        case DType::f16:
            multiply_float<f16>(weight, rows, packed, m, y, y_stride);
            break;
        case DType::i8:
            multiply_int8(weight, rows, packed, m, y, y_stride);
            break;
        case DType::i4:
            multiply_int4(weight, rows, packed, m, y, y_stride);
            break;
        default:
            multiply_float<float>(weight, rows, packed, m, y, y_stride);
            break;
        }
        y += weight.rows;
    }
}

} // namespace fuseline

using namespace fuseline;

extern "C" FUSELINE_EXPORT int64_t fl_cpu_linear_packed_bytes(const LinearWeight* weight, int64_t m) {
    return packed_bytes(*weight, m);
}

// y[m, rows of all parts] = x[m, cols] W^T + bias on the process's team; packed is packed_bytes(parts[0], m) of
// scratch.
extern "C" FUSELINE_EXPORT void fl_cpu_linear(const LinearWeight* parts, int num_parts, const float* x,
                                              int64_t x_stride, int64_t m, float* y, int64_t y_stride, void* packed) {
    Team::instance().run([&](const Worker& worker) {
        pack_input(parts[0], x, x_stride, m, share(m, 1, worker), packed);
        worker.barrier();
        linear(worker, parts, num_parts, packed, m, y, y_stride);
    });
}
