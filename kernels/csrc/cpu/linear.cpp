// Linear layers: to each dtype its kernels.
#include "linear.h"

#include "linear_float.h"
#include "linear_quantized.h"
#include "linear_tiles.h"

namespace fuseline {

namespace {

struct Kernels {
    decltype(&float_packed_bytes<float>) packed_bytes;
    decltype(&pack_float<float>) pack;
    decltype(&multiply_float<float>) multiply;
    // Rows of W that a worker takes at once: what kernels like best, and what they can do with where rows are few.
    int64_t grain, least_grain;
};

template <class T>
constexpr Kernels kFloat{float_packed_bytes<T>, pack_float<T>, multiply_float<T>, kFloatGrain, 16};
constexpr Kernels kTiles{tiles_packed_bytes, pack_tiles, multiply_tiles, 32, 16};
constexpr Kernels kInt8{int8_packed_bytes, pack_int8, multiply_int8, kPanelRows, kPanelRows};
constexpr Kernels kInt4{int4_packed_bytes, pack_int4, multiply_int4, kPanelRows, kPanelRows};

const Kernels& kernels_for(DType dtype) {
    switch (dtype) {
    case DType::bf16:
        return tiles_take_bf16() ? kTiles : kFloat<bf16>;
    case DType::f16:
        return kFloat<f16>;
    case DType::i8:
        return kInt8;
    case DType::i4:
        return kInt4;
    default:
        return kFloat<float>;
    }
}

// Into how many pieces a worker's share falls, each large enough to stream.
constexpr int64_t kPieces = 8;

int64_t grains_of(const LinearWeight& weight, int64_t grain) {
    return (weight.rows + grain - 1) / grain;
}

} // namespace

int64_t packed_bytes(const LinearWeight& weight, int64_t m) {
    return kernels_for(weight.dtype).packed_bytes(weight.cols, m);
}

void pack_input(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    kernels_for(weight.dtype).pack(weight, x, x_stride, m, rows, packed);
}

void linear(const Worker& worker, const LinearWeight* parts, int num_parts, const void* packed, int64_t m, float* y,
            int64_t y_stride) {
    const Kernels& kernels = kernels_for(parts[0].dtype);
    int64_t all_rows = 0, grains = 0;
    for (int part = 0; part < num_parts; ++part)
        all_rows += parts[part].rows;
    const int64_t grain = all_rows >= 4 * kernels.grain * worker.count ? kernels.grain : kernels.least_grain;
    for (int part = 0; part < num_parts; ++part)
        grains += grains_of(parts[part], grain);
    const auto multiply = [&](Range piece) { // in grains of all parts, counted from the part at hand
        float* to = y;
        for (int part = 0; part < num_parts; ++part) {
            const LinearWeight& weight = parts[part];
            const Range rows{std::clamp<int64_t>(piece.begin * grain, 0, weight.rows),
                             std::clamp<int64_t>(piece.end * grain, 0, weight.rows)};
            if (rows.size() > 0)
                kernels.multiply(weight, rows, packed, m, to, y_stride);
            piece = {piece.begin - grains_of(weight, grain), piece.end - grains_of(weight, grain)};
            to += weight.rows;
        }
    };
    worker.for_pieces(grains, std::max<int64_t>(1, grains / (kPieces * worker.count)), multiply);
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
