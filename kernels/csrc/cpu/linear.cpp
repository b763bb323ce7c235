// Dense linear layers: a dot-product micro-kernel, vectorised along cols.
//
// An element of y has one vector accumulator that runs over cols in order; its lanes are summed at the end. A block of
// Rows rows of W by Cols rows of x is computed at once, so that each vector of W that is read and widened serves Cols
// products and each of x serves Rows. Blocks of different shapes do the same operations per element, so the result
// does not depend on which block an element falls into.
//
// Packed x: panels of kPanel rows (the last may have fewer), each [vectors along cols][rows of the panel][kLanes], zero
// beyond cols. For bf16 weights each pair of vectors holds the even, then the odd elements of 2 * kLanes: a vector of
// bf16 read as 32-bit integers is widened by a shift and a mask, without a shuffle.
#include "linear.h"

#include "isa.h"

namespace fuseline {

namespace {

constexpr int kPanel = 4;

// Elements of W that one step of the micro-kernel takes along cols, and how they become vectors.
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

template <class T>
int64_t packed_cols(int64_t cols) {
    constexpr int64_t step = Step<T>::kElements;
    return (cols + step - 1) / step * step;
}

template <class T, int Rows, int Cols>
inline __attribute__((always_inline)) void multiply(const T* const (&w)[Rows], int64_t at, const float* x,
                                                    f32v (&sums)[Rows][Cols]) {
#pragma GCC unroll 2
    for (int vector = 0; vector < Step<T>::kVectors; ++vector) {
        f32v widened[Rows];
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row)
            widened[row] = Step<T>::vector(w[row] + at, vector);
#pragma GCC unroll 16
        for (int col = 0; col < Cols; ++col) {
            const f32v input = load(x + (vector * Cols + col) * kLanes);
#pragma GCC unroll 16
            for (int row = 0; row < Rows; ++row)
                sums[row][col] = fma(widened[row], input, sums[row][col]);
        }
    }
}

// One block: y[0..Cols)[0..Rows) = x W^T + bias.
template <class T, int Rows, int Cols>
void block(const T* weight, int64_t row_stride, int64_t cols, const float* bias, const float* x, float* y,
           int64_t y_stride) {
    constexpr int64_t step = Step<T>::kElements;
    const T* w[Rows];
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row)
        w[row] = weight + row * row_stride;
    f32v sums[Rows][Cols] = {};
    const int64_t whole = cols / step * step;
    for (int64_t at = 0; at < whole; at += step)
        multiply<T, Rows, Cols>(w, at, x + at * Cols, sums);
    if (whole < cols) { // the rows' ends, copied: what lies beyond them is not ours to read
        T tail[Rows][step] = {};
        const T* tails[Rows];
        for (int row = 0; row < Rows; ++row) {
            std::memcpy(tail[row], w[row] + whole, (cols - whole) * sizeof(T));
            tails[row] = tail[row];
        }
        multiply<T, Rows, Cols>(tails, 0, x + whole * Cols, sums);
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
        for (int col = 0; col < Cols; ++col) {
            y[col * y_stride + row] = hsum(sums[row][col]) + (bias == nullptr ? 0.0f : bias[row]);
        }
    }
}

// Rows of a block by the rows of its panel: as many accumulators as registers hold beside what is being multiplied.
constexpr int block_rows(int panel_rows) {
    constexpr bool many = kVectorBytes == 64; // 32 registers instead of 16
    return panel_rows == 1 ? 8 : panel_rows == 2 ? (many ? 8 : 6) : panel_rows == 3 ? (many ? 8 : 4) : (many ? 6 : 3);
}
constexpr int64_t kGrain = 24; // a multiple of all of them

template <class T, int Cols>
void panel_times_rows(const LinearWeight& weight, Range rows, const float* x, float* y, int64_t y_stride) {
    constexpr int kRows = block_rows(Cols);
    const T* data = static_cast<const T*>(weight.data);
    int64_t row = rows.begin;
    for (; row + kRows <= rows.end; row += kRows) {
        block<T, kRows, Cols>(data + row * weight.row_stride, weight.row_stride, weight.cols,
                              weight.bias == nullptr ? nullptr : weight.bias + row, x, y + row, y_stride);
    }
    for (; row < rows.end; ++row) {
        block<T, 1, Cols>(data + row * weight.row_stride, weight.row_stride, weight.cols,
                          weight.bias == nullptr ? nullptr : weight.bias + row, x, y + row, y_stride);
    }
}

// Bytes of W that stay in the second-level cache while all panels pass by.
constexpr int64_t kWeightBlockBytes = 192 * 1024;

template <class T>
void linear_rows(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y, int64_t y_stride) {
    const int64_t padded = packed_cols<T>(weight.cols);
    const int64_t fit = kWeightBlockBytes / int64_t(padded * sizeof(T)) / kGrain * kGrain;
    const int64_t block_size = m <= kPanel ? rows.size() : std::max(kGrain, fit);
    for (int64_t begin = rows.begin; begin < rows.end; begin += block_size) {
        const Range part{begin, std::min(begin + block_size, rows.end)};
        for (int64_t first = 0; first < m; first += kPanel) {
            const float* x = packed + first * padded;
            float* out = y + first * y_stride;
            switch (m - first) {
            case 1:
                panel_times_rows<T, 1>(weight, part, x, out, y_stride);
                break;
            case 2:
                panel_times_rows<T, 2>(weight, part, x, out, y_stride);
                break;
            case 3:
                panel_times_rows<T, 3>(weight, part, x, out, y_stride);
                break;
            default:
                panel_times_rows<T, kPanel>(weight, part, x, out, y_stride);
                break;
            }
        }
    }
}

template <class T>
void pack_rows(int64_t cols, const float* x, int64_t x_stride, int64_t m, Range rows, float* packed) {
    constexpr int kVectors = Step<T>::kVectors;
    constexpr int64_t step = Step<T>::kElements;
    const int64_t padded = packed_cols<T>(cols);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t first = row / kPanel * kPanel;
        const int64_t height = std::min<int64_t>(kPanel, m - first);
        float* to = packed + first * padded + (row - first) * kLanes;
        const float* from = x + row * x_stride;
        for (int64_t at = 0; at < padded; at += step, to += kVectors * height * kLanes) {
            float piece[step] = {};
            std::memcpy(piece, from + at, std::min(step, cols - at) * sizeof(float));
            for (int vector = 0; vector < kVectors; ++vector) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    to[vector * height * kLanes + lane] = piece[lane * kVectors + vector];
                }
            }
        }
    }
}

} // namespace

int64_t packed_bytes(const LinearWeight& weight, int64_t m) {
    switch (weight.dtype) {
    case DType::bf16:
        return m * packed_cols<bf16>(weight.cols) * int64_t(sizeof(float));
    case DType::f16:
        return m * packed_cols<f16>(weight.cols) * int64_t(sizeof(float));
    default:
        return m * packed_cols<float>(weight.cols) * int64_t(sizeof(float));
    }
}

void pack_input(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    float* to = static_cast<float*>(packed);
    switch (weight.dtype) {
    case DType::bf16:
        return pack_rows<bf16>(weight.cols, x, x_stride, m, rows, to);
    case DType::f16:
        return pack_rows<f16>(weight.cols, x, x_stride, m, rows, to);
    default:
        return pack_rows<float>(weight.cols, x, x_stride, m, rows, to);
    }
}

void linear(const Worker& worker, const LinearWeight* parts, int num_parts, const void* packed, int64_t m, float* y,
            int64_t y_stride) {
    const float* x = static_cast<const float*>(packed);
    for (int part = 0; part < num_parts; ++part) {
        const LinearWeight& weight = parts[part];
        const Range rows = share(weight.rows, kGrain, worker);
        switch (weight.dtype) {
        case DType::bf16:
            linear_rows<bf16>(weight, rows, x, m, y, y_stride);
            break;
        case DType::f16:
            linear_rows<f16>(weight, rows, x, m, y, y_stride);
            break;
        default:
            linear_rows<float>(weight, rows, x, m, y, y_stride);
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
        pack_input(parts[0], x, x_stride, m, share(m, kPanel, worker), packed);
        worker.barrier();
        linear(worker, parts, num_parts, packed, m, y, y_stride);
    });
}
