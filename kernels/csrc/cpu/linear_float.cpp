// Dense linear layers of fewer than kManyRows rows: dot products, vectorised along cols.
//
// An element of y has one vector accumulator that runs over cols in order; its lanes are summed at the end. A block of
// Rows rows of W by Cols rows of x is computed at once, so that each vector of W that is read and widened serves Cols
// products and each of x serves Rows. Blocks of different shapes do the same operations per element, so the result
// does not depend on which block an element falls into.
//
// Packed x: blocks of kColBlock columns, in each the panels of kPanel rows (the last may have fewer), in each panel
// [vectors along cols][rows of the panel][kLanes], zero beyond cols; which elements a vector holds, Step tells.
#include "linear_float.h"

#include <type_traits>
#include <utility>

#include "float_steps.h"

namespace fuseline {

namespace {

constexpr int kPanel = 4;
// Columns whose part of x stays in a cache while rows of W go past.
constexpr int64_t kColBlock = 1024;

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

// What the blocks of a piece of work have in common: some rows and columns of W, and a panel of x.
template <class T>
struct Piece {
    const T* w; // the first row, first column
    int64_t row_stride;
    int64_t cols;      // a multiple of a step, unless they are the last
    bool first, last;  // whether no columns lie before or behind; sums of those before have been parked
    float* parked;     // accumulators of the panel, Cols vectors a row
    const float* bias; // of the first row, or null
    float* y;          // of the first row of W and of the panel
    int64_t y_stride;
};

// Rows of W, as many columns of each as a piece has, that come into the cache while something else is computed.
template <class T>
struct Fetch {
    const T* w;
    int64_t row_stride;
    int64_t rows;
};

// Rows row, row + gap … of W, Rows of them, times the Cols rows of a panel; x points to the panel's vectors of these
// columns. Streams: what is fetched are the rows one further. Not inlined, since inside a larger function the compiler
// keeps the pointers of the loop in memory.
template <class T, int Rows, int Cols, bool Streams>
__attribute__((noinline)) void block(const Piece<T>& piece, int64_t row, int64_t gap, const float* x,
                                     const Fetch<T>& fetch) {
    constexpr int64_t step = Step<T>::kElements;
    const T* w[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
        w[i] = piece.w + (row + i * gap) * piece.row_stride;
    f32v sums[Rows][Cols] = {};
    float* parked = piece.parked + row * Cols * kLanes;
    if (!piece.first) {
#pragma GCC unroll 32
        for (int i = 0; i < Rows * Cols; ++i)
            sums[i / Cols][i % Cols] = load(parked + i * kLanes);
    }

    const int64_t size = piece.cols, whole = size / step * step;
    constexpr int kStepsPerLine = std::max<int>(1, 64 / (step * sizeof(T)));
    int64_t at = 0;
    for (; at + step * kStepsPerLine <= whole; at += step * kStepsPerLine) {
        for (int64_t i = 0; !Streams && i < fetch.rows; ++i)
            __builtin_prefetch(fetch.w + i * fetch.row_stride + at);
#pragma GCC unroll 8
        for (int part = 0; part < kStepsPerLine; ++part) {
#pragma GCC unroll 16
            for (int i = part; Streams && i < Rows; i += kStepsPerLine)
                __builtin_prefetch(w[i] + piece.row_stride + at);
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
    if (!piece.last) {
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
    for (int col = 0; col < Cols; ++col) {
        float* y = piece.y + col * piece.y_stride + row;
        for (int i = 0; i < Rows; ++i)
            y[i * gap] = totals[col * Rows + i] + (piece.bias == nullptr ? 0.0f : piece.bias[row + i * gap]);
    }
}

// Rows of a block by the rows of its panel: as many accumulators as registers hold beside what is being multiplied, of
// which there is more where a load is widened to two vectors.
template <class T>
constexpr int block_rows(int panel_rows) {
    if (kVectorBytes == 64) // 32 registers instead of 16
        return panel_rows == kPanel ? 6 : 8;
    constexpr bool wide = Step<T>::kVectors == 2;
    return panel_rows == 1 ? 8 : panel_rows == 2 ? (wide ? 4 : 6) : panel_rows == 3 ? (wide ? 3 : 4) : 3;
}
static_assert(kFloatGrain % 8 == 0 && kFloatGrain % 6 == 0); // and so of 4 and 3

// The piece's rows times a panel of Cols rows.
template <class T, int Cols>
void multiply_panel(const Piece<T>& piece, int64_t rows, const float* x, const Fetch<T>& fetch) {
    constexpr int kRows = block_rows<T>(Cols);
    const int64_t blocks = rows / kRows;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = fetch.rows * i / blocks, end = fetch.rows * (i + 1) / blocks;
        block<T, kRows, Cols, false>(piece, i * kRows, 1, x,
                                     {fetch.w + first * fetch.row_stride, fetch.row_stride, end - first});
    }
    for (int64_t row = blocks * kRows; row < rows; ++row)
        block<T, 1, Cols, false>(piece, row, 1, x, {});
}

// Likewise, with W coming from memory: as many rows at once as a block has, each the start of a stream of adjacent
// rows. The hardware sees a single row's stream coming, and needs to.
template <class T, int Cols>
void stream_panel(const Piece<T>& piece, int64_t rows, const float* x) {
    constexpr int kRows = block_rows<T>(Cols);
    const int64_t gap = rows / kRows;
    for (int64_t i = 0; i < gap; ++i)
        block<T, kRows, Cols, (Cols > 1)>(piece, i, gap, x, {});
    for (int64_t row = gap * kRows; row < rows; ++row)
        block<T, 1, Cols, false>(piece, row, 1, x, {});
}

// Calls f with the number of rows that a panel has at the end of m rows, as a constant.
template <class F>
void with_panel_rows(int64_t rows, const F& f) {
    switch (rows) {
    case 1:
        return f(std::integral_constant<int, 1>());
    case 2:
        return f(std::integral_constant<int, 2>());
    case 3:
        return f(std::integral_constant<int, 3>());
    default:
        return f(std::integral_constant<int, kPanel>());
    }
}

// Rows of a weight times some panels, in blocks for the caches: a few rows of W by kColBlock columns stay in the first
// level, or the second, while the panels go past. The next such piece of W is fetched meanwhile.
constexpr int64_t kRowBlock = 24;
static_assert(kFloatGrain % kRowBlock == 0 && kColBlock % Step<bf16>::kElements == 0);

// Of each thread: the accumulators of a block of rows and all panels.
alignas(64) thread_local float parked[kRowBlock * kManyRows * kLanes];

template <class T>
void multiply_blocked(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y,
                      int64_t y_stride) {
    const int64_t panels = (m + kPanel - 1) / kPanel;
    for (int64_t row = rows.begin; row < rows.end; row += kRowBlock) {
        const int64_t num_rows = std::min(kRowBlock, rows.end - row);
        for (int64_t col = 0; col < weight.cols; col += kColBlock) {
            const int64_t cols = std::min(kColBlock, weight.cols - col), padded = packed_cols<T>(cols);
            const bool last = col + cols == weight.cols;
            const T* w = static_cast<const T*>(weight.data) + row * weight.row_stride + col;
            const T* next = last ? w - col + kRowBlock * weight.row_stride : w + kColBlock;
            Piece<T> piece{w,
                           weight.row_stride,
                           cols,
                           col == 0,
                           last,
                           parked,
                           weight.bias == nullptr ? nullptr : weight.bias + row,
                           y + row,
                           y_stride};
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t first = kRowBlock * panel / panels, end = kRowBlock * (panel + 1) / panels;
                const Fetch<T> fetch{next + first * weight.row_stride, weight.row_stride, end - first};
                const float* x = packed + col * m + panel * kPanel * padded;
                with_panel_rows(m - panel * kPanel, [&](auto panel_rows) {
                    multiply_panel<T, decltype(panel_rows)::value>(piece, num_rows, x, fetch);
                });
                piece.parked += kRowBlock * kPanel * kLanes;
                piece.y += kPanel * y_stride;
            }
        }
    }
}

template <class T>
void linear_rows(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y, int64_t y_stride) {
    if (m > kPanel)
        return multiply_blocked<T>(weight, rows, packed, m, y, y_stride);
    // W is read once, at the speed of memory. The blocks of columns of a single panel lie close behind each other.
    const Piece<T> piece{static_cast<const T*>(weight.data) + rows.begin * weight.row_stride,
                         weight.row_stride,
                         weight.cols,
                         true,
                         true,
                         nullptr,
                         weight.bias == nullptr ? nullptr : weight.bias + rows.begin,
                         y + rows.begin,
                         y_stride};
    with_panel_rows(m,
                    [&](auto panel_rows) { stream_panel<T, decltype(panel_rows)::value>(piece, rows.size(), packed); });
}

template <int First, size_t... Index>
inline f32v every_second(f32v low, f32v high, std::index_sequence<Index...>) {
    return __builtin_shufflevector(low, high, int(First + 2 * Index)...);
}

// The elements First, First + 2 … of two vectors.
template <int First>
inline f32v every_second(f32v low, f32v high) {
    return every_second<First>(low, high, std::make_index_sequence<kLanes>());
}

// Where the vectors of a row of x go.
template <class T>
void pack_rows(int64_t cols, const float* x, int64_t x_stride, int64_t m, Range rows, float* packed) {
    constexpr int kVectors = Step<T>::kVectors;
    constexpr int64_t step = Step<T>::kElements;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t panel = row / kPanel * kPanel;
        const int64_t height = std::min<int64_t>(kPanel, m - panel);
        const float* from = x + row * x_stride;
        for (int64_t col = 0; col < cols; col += kColBlock) {
            const int64_t padded = packed_cols<T>(std::min(kColBlock, cols - col));
            float* to = packed + col * m + panel * padded + (row - panel) * kLanes;
            for (int64_t at = col; at < col + padded; at += step, to += kVectors * height * kLanes) {
                float piece[step] = {};
                const float* elements = from + at;
                if (at + step > cols) {
                    std::copy(from + at, from + cols, piece);
                    elements = piece;
                }
                if constexpr (kVectors == 1) {
                    store(to, load(elements));
                } else {
                    const f32v low = load(elements), high = load(elements + kLanes);
                    store(to, every_second<0>(low, high));
                    store(to + height * kLanes, every_second<1>(low, high));
                }
            }
        }
    }
}

} // namespace

template <class T>
int64_t float_packed_bytes(int64_t cols, int64_t m) {
    const int64_t padded = packed_cols<T>(cols);
    return int64_t(sizeof(float)) * (m < kManyRows ? m * padded : many_packed_floats(padded, m));
}

template <class T>
void pack_float(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    (m < kManyRows ? pack_rows<T> : pack_many<T>)(weight.cols, x, x_stride, m, rows, static_cast<float*>(packed));
}

template <class T>
void multiply_float(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    (m < kManyRows ? linear_rows<T> : multiply_many<T>)(weight, rows, static_cast<const float*>(packed), m, y,
                                                        y_stride);
}

#define INSTANTIATE(T)                                                                                                 \
    template int64_t float_packed_bytes<T>(int64_t, int64_t);                                                          \
    template void pack_float<T>(const LinearWeight&, const float*, int64_t, int64_t, Range, void*);                    \
    template void multiply_float<T>(const LinearWeight&, Range, const void*, int64_t, float*, int64_t)
INSTANTIATE(float);
INSTANTIATE(bf16);
INSTANTIATE(f16);

} // namespace fuseline
