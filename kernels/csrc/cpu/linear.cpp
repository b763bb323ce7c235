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
                accumulate(sums[row][col], widened[row], input);
        }
    }
}

// What the blocks of a piece of work have in common: columns [begin, end) of W, of which those before have been parked
// and those behind are still to come.
template <class T>
struct Piece {
    const LinearWeight& weight;
    int64_t begin; // a multiple of a step
    int64_t end;   // likewise, or cols
    float* y;      // of the panel's first row
    int64_t y_stride;
    float* parked; // accumulators of the panel, Cols vectors for each of the rows from first_row on
    int64_t first_row;

    const T* at(int64_t row) const { return static_cast<const T*>(weight.data) + row * weight.row_stride; }
};

// Rows [row, row + Rows) of W times the Cols rows of a panel; x points to the panel's vectors from piece.begin on.
template <class T, int Rows, int Cols>
void block(const Piece<T>& piece, int64_t row, const float* x) {
    constexpr int64_t step = Step<T>::kElements;
    const T* w[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
        w[i] = piece.at(row + i) + piece.begin;
    f32v sums[Rows][Cols] = {};
    float* parked = piece.parked + (row - piece.first_row) * Cols * kLanes;
    if (piece.begin > 0) {
#pragma GCC unroll 32
        for (int i = 0; i < Rows * Cols; ++i)
            sums[i / Cols][i % Cols] = load(parked + i * kLanes);
    }

    const int64_t size = piece.end - piece.begin, whole = size / step * step;
    const int64_t ahead = Rows * piece.weight.row_stride;
    // A cache line of each row at a time, while the same line of the next block's rows is fetched: the rows are too
    // short for the hardware to get ahead of.
    constexpr int kStepsPerLine = std::max<int>(1, 64 / (step * sizeof(T)));
    int64_t at = 0;
    for (; at + step * kStepsPerLine <= whole; at += step * kStepsPerLine) {
#pragma GCC unroll 8
        for (int part = 0; part < kStepsPerLine; ++part) {
#pragma GCC unroll 16
            for (int i = part; i < Rows; i += kStepsPerLine)
                __builtin_prefetch(w[i] + ahead + at);
            multiply<T, Rows, Cols>(w, at + part * step, x + (at + part * step) * Cols, sums);
        }
    }
    for (; at < whole; at += step)
        multiply<T, Rows, Cols>(w, at, x + at * Cols, sums);
    if (whole < size) { // the rows' ends, copied: what lies beyond them is not ours to read
        T tail[Rows][step] = {};
        const T* tails[Rows];
        for (int i = 0; i < Rows; ++i) {
            std::memcpy(tail[i], w[i] + whole, (size - whole) * sizeof(T));
            tails[i] = tail[i];
        }
        multiply<T, Rows, Cols>(tails, 0, x + whole * Cols, sums);
    }
    if (piece.end < piece.weight.cols) {
#pragma GCC unroll 32
        for (int i = 0; i < Rows * Cols; ++i)
            store(parked + i * kLanes, sums[i / Cols][i % Cols]);
        return;
    }

    constexpr int kSums = Rows * Cols;
    alignas(16) float totals[(kSums + 3) / 4 * 4];
#pragma GCC unroll 16
    for (int first = 0; first < kSums; first += 4) { // in the order of y: row by row of x
        const auto sum = [&](int index) {
            return index < kSums ? sums[index % Rows][std::min(index / Rows, Cols - 1)] : f32v{};
        };
        const f32x4 four = hsum(sum(first), sum(first + 1), sum(first + 2), sum(first + 3));
        std::memcpy(totals + first, &four, sizeof four);
    }
    const float* bias = piece.weight.bias;
    for (int col = 0; col < Cols; ++col) {
        float* y = piece.y + col * piece.y_stride + row;
        for (int i = 0; i < Rows; ++i)
            y[i] = totals[col * Rows + i] + (bias == nullptr ? 0.0f : bias[row + i]);
    }
}

// Rows of a block by the rows of its panel: as many accumulators as registers hold beside what is being multiplied.
constexpr int block_rows(int panel_rows) {
    constexpr bool many = kVectorBytes == 64; // 32 registers instead of 16
    return panel_rows == 1 ? 8 : panel_rows == 2 ? (many ? 8 : 6) : panel_rows == 3 ? (many ? 8 : 4) : (many ? 6 : 3);
}
constexpr int64_t kGrain = 24; // a multiple of all of them

template <class T, int Cols>
void panel_times_rows(const Piece<T>& piece, Range rows, const float* panel) {
    constexpr int kRows = block_rows(Cols);
    const float* x = panel + piece.begin * Cols;
    int64_t row = rows.begin;
    for (; row + kRows <= rows.end; row += kRows)
        block<T, kRows, Cols>(piece, row, x);
    for (; row < rows.end; ++row)
        block<T, 1, Cols>(piece, row, x);
}

// Cache blocking for more than one panel: kRowBlock rows of W by kColBlock columns go past kPanelBlock rows of x, so
// that a panel's piece stays in the first-level cache, and W's and the parked accumulators in the second.
constexpr int64_t kRowBlock = 48, kPanelBlock = 32, kColBlock = 512;
static_assert(kRowBlock % kGrain == 0 && kPanelBlock % kPanel == 0 && kColBlock % Step<bf16>::kElements == 0);

template <class T>
void panels_times_rows(const LinearWeight& weight, Range cols, Range rows, Range panels, int64_t m, const float* packed,
                       float* y, int64_t y_stride, float* parked) {
    const int64_t padded = packed_cols<T>(weight.cols);
    for (int64_t first = panels.begin; first < panels.end; first += kPanel) {
        const Piece<T> piece{weight, cols.begin, cols.end, y + first * y_stride, y_stride, parked, rows.begin};
        const float* panel = packed + first * padded;
        switch (m - first) {
        case 1:
            panel_times_rows<T, 1>(piece, rows, panel);
            break;
        case 2:
            panel_times_rows<T, 2>(piece, rows, panel);
            break;
        case 3:
            panel_times_rows<T, 3>(piece, rows, panel);
            break;
        default:
            panel_times_rows<T, kPanel>(piece, rows, panel);
        }
        parked += rows.size() * kPanel * kLanes;
    }
}

template <class T>
void linear_rows(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y, int64_t y_stride) {
    alignas(64) float parked[kRowBlock * kPanelBlock * kLanes];
    if (m <= kPanel) // W is read once, at the speed of memory: straight through
        return panels_times_rows<T>(weight, {0, weight.cols}, rows, {0, m}, m, packed, y, y_stride, parked);
    for (int64_t row = rows.begin; row < rows.end; row += kRowBlock) {
        const Range some_rows{row, std::min(row + kRowBlock, rows.end)};
        for (int64_t panel = 0; panel < m; panel += kPanelBlock) {
            const Range panels{panel, std::min(panel + kPanelBlock, m)};
            for (int64_t col = 0; col < weight.cols; col += kColBlock) {
                const Range cols{col, std::min(col + kColBlock, weight.cols)};
                panels_times_rows<T>(weight, cols, some_rows, panels, m, packed, y, y_stride, parked);
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
