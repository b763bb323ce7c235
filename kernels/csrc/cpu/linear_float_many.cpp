// Dense linear layers of many rows: outer products, vectorised along the rows of W.
//
// The results are to the bit those of the dot products in linear_float.cpp, which keep one sum for each lane of a
// vector and add the lanes at the end. Here a lane is a pass: it multiplies the columns that fall to that lane, so that
// a vector holds the same lane's sums of kLanes rows of W, and the passes are added in the order of hsum. A tile of
// kTileRows rows of x by 2 * kLanes of W reads a third of what dot products do from the caches, and W, transposed once
// for all rows of x, lies in the first level during a pass over them.
//
// Packed x: blocks of kManyCols columns; in each, blocks of kBlockTiles tiles of rows; in each, the passes; in each,
// the tiles: [columns of the lane][kTileRows], zero beyond cols and m.
#include "linear_float.h"

#include <utility>

#include "float_steps.h"

namespace fuseline {

namespace {

constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6; // with 32 registers, or 16
constexpr int kTileCols = 2 * kLanes;
constexpr int kTileFloats = kTileRows * kTileCols;
static_assert(kFloatGrain % kTileCols == 0);
// What stays in the second-level cache: the sums of all lanes of so many tiles, and so many columns of W, of which
// those of one lane stay in the first.
constexpr int64_t kBlockTiles = (512 + kTileRows - 1) / kTileRows, kManyCols = 2048;

// Of each thread: the sums of a block of tiles, lane by lane, and some rows of W.
alignas(64) thread_local float parked[kLanes][kBlockTiles][kTileFloats];
alignas(64) thread_local float transposed[kManyCols * kTileCols];

// The lane of a pass: hsum folds the lanes upon each other down to four, then adds neighbours.
constexpr int lane_of(int pass) {
    constexpr int folds = kLanes / 4;
    int place = 0;
    for (int bit = 1; bit < folds; bit *= 2)
        place = 2 * place + (pass & bit ? 1 : 0);
    return pass / folds + 4 * place;
}

// Where the parts of packed x lie, in floats; a block of columns has `depth` of each lane.
struct PackedRows {
    int64_t tiles;

    explicit PackedRows(int64_t m) : tiles((m + kTileRows - 1) / kTileRows) {}

    int64_t block_tiles(int64_t first_tile) const { return std::min(kBlockTiles, tiles - first_tile); }

    // The first pass of a block of tiles, whose first is given.
    int64_t at(int64_t col, int64_t depth, int64_t first_tile) const {
        return kTileRows * (tiles * col + first_tile * kLanes * depth);
    }
};

// Lanes of a whose bit Distance is 0, with those of b beside them; or those whose bit is 1.
template <int Distance, bool One, size_t... Lane>
inline f32v beside(f32v a, f32v b, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(a, b,
                                   int((Lane & Distance ? kLanes + Lane - Distance : Lane) + (One ? Distance : 0))...);
}

// A square of kLanes vectors, by squares of twice the Distance.
template <int Distance = 1>
inline __attribute__((always_inline)) void transpose(f32v (&rows)[kLanes]) {
    if constexpr (Distance < kLanes) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) {
            if (row & Distance)
                continue;
            const f32v a = rows[row], b = rows[row + Distance];
            rows[row] = beside<Distance, false>(a, b, std::make_index_sequence<kLanes>());
            rows[row + Distance] = beside<Distance, true>(a, b, std::make_index_sequence<kLanes>());
        }
        transpose<2 * Distance>(rows);
    }
}

// Columns of kTileCols rows of W, of which there may be fewer: what the others hold is nobody's. [pass][depth][row]
template <class T>
void transpose_rows(const LinearWeight& weight, Range rows, Range cols) {
    constexpr int64_t step = Step<T>::kElements;
    const int64_t depth = packed_cols<T>(cols.size()) / kLanes;
    for (int half = 0; half < 2; ++half) {
        const T* from[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int64_t row = std::min(rows.begin + half * kLanes + i, rows.end - 1);
            from[i] = static_cast<const T*>(weight.data) + row * weight.row_stride + cols.begin;
        }
        float* to = transposed + half * kLanes;
        for (int64_t at = 0; at < cols.size(); at += step) {
            T tail[kLanes][step];
            const T* elements[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                elements[i] = from[i] + at;
                if (at + step > cols.size()) {
                    std::memset(tail[i], 0, sizeof tail[i]);
                    std::memcpy(tail[i], elements[i], (cols.size() - at) * sizeof(T));
                    elements[i] = tail[i];
                }
            }
            for (int vector = 0; vector < Step<T>::kVectors; ++vector, to += kTileCols) {
                f32v square[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    square[i] = Step<T>::vector(elements[i], vector);
                transpose(square);
#pragma GCC unroll 16
                for (int pass = 0; pass < kLanes; ++pass)
                    store(to + pass * depth * kTileCols, square[lane_of(pass)]);
            }
        }
    }
}

// One tile of one pass: adds depth products to each sum, which begin at zero or where the columns before have left
// them, then the sums of `adds` groups of earlier passes. Not inlined, since inside a larger function the compiler
// keeps the pointers of the loop in memory.
__attribute__((noinline)) void multiply_tile(const float* w, const float* x, int64_t depth, bool first, int adds,
                                             float* tile) {
    f32v sums[2 * kTileRows] = {};
    if (!first) {
#pragma GCC unroll 32
        for (int i = 0; i < 2 * kTileRows; ++i)
            sums[i] = load(tile + i * kLanes);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < depth; ++i, w += kTileCols, x += kTileRows) {
        const f32v low = load(w), high = load(w + kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kTileRows; ++row) {
            const f32v input = splat(x[row]);
            accumulate(sums[2 * row], low, input);
            accumulate(sums[2 * row + 1], high, input);
        }
    }
    for (int add = 0; add < adds; ++add) {
        const float* earlier = tile - (kBlockTiles * kTileFloats << add);
#pragma GCC unroll 32
        for (int i = 0; i < 2 * kTileRows; ++i)
            sums[i] = load(earlier + i * kLanes) + sums[i];
    }
#pragma GCC unroll 32
    for (int i = 0; i < 2 * kTileRows; ++i)
        store(tile + i * kLanes, sums[i]);
}

// All passes over a block of tiles. done(tile, sums) is called for each tile once its sums are complete, which they are
// behind the last columns.
template <class Done>
void multiply_passes(const float* x, int64_t depth, int64_t tiles, bool first, bool last, const Done& done) {
    for (int pass = 0; pass < kLanes; ++pass) {
        // As a binary counter carries: a pass whose number ends in ones completes as many groups.
        const int adds = last ? __builtin_ctz(~pass) : 0;
        for (int64_t tile = 0; tile < tiles; ++tile, x += depth * kTileRows) {
            multiply_tile(transposed + pass * depth * kTileCols, x, depth, first, adds, parked[pass][tile]);
            if (last && pass == kLanes - 1)
                done(tile, parked[pass][tile]);
        }
    }
}

// The sums of a tile, and a bias or null, to `rows` by `cols` elements of y.
void write_tile(const float* sums, const float* bias, int64_t rows, int64_t cols, float* y, int64_t y_stride) {
    float biases[kTileCols] = {};
    if (bias != nullptr)
        std::copy_n(bias, cols, biases);
    for (int64_t row = 0; row < rows; ++row, sums += kTileCols, y += y_stride) {
        float values[kTileCols];
        for (int half = 0; half < kTileCols; half += kLanes)
            store(values + half, load(sums + half) + load(biases + half));
        if (cols == kTileCols)
            std::memcpy(y, values, sizeof values);
        else
            std::copy_n(values, cols, y);
    }
}

} // namespace

int64_t many_packed_floats(int64_t padded_cols, int64_t m) {
    return PackedRows(m).tiles * kTileRows * padded_cols;
}

template <class T>
void pack_many(int64_t cols, const float* x, int64_t x_stride, int64_t m, Range rows, float* packed) {
    constexpr int64_t step = Step<T>::kElements, vectors = Step<T>::kVectors;
    const PackedRows layout(m);
    const int64_t end = rows.end == m ? layout.tiles * kTileRows : rows.end;
    for (int64_t row = rows.begin; row < end; ++row) {
        const int64_t tile = row / kTileRows, first_tile = tile / kBlockTiles * kBlockTiles;
        for (int64_t col = 0; col < cols; col += kManyCols) {
            const int64_t size = row < m ? std::min(kManyCols, cols - col) : 0;
            const int64_t padded = packed_cols<T>(std::min(kManyCols, cols - col)), depth = padded / kLanes;
            for (int pass = 0; pass < kLanes; ++pass) {
                const int64_t block = pass * layout.block_tiles(first_tile) + tile - first_tile;
                float* to = packed + layout.at(col, depth, first_tile) + block * depth * kTileRows + row % kTileRows;
                const int64_t first = lane_of(pass) * vectors;
                for (int64_t at = first; at < padded; at += step)
                    for (int64_t i = at; i < at + vectors; ++i, to += kTileRows)
                        *to = i < size ? x[row * x_stride + col + i] : 0.0f;
            }
        }
    }
}

template <class T>
void multiply_many(const LinearWeight& weight, Range rows, const float* packed, int64_t m, float* y, int64_t y_stride) {
    const PackedRows layout(m);
    for (int64_t row = rows.begin; row < rows.end; row += kTileCols) {
        const Range some{row, std::min<int64_t>(row + kTileCols, rows.end)};
        const float* bias = weight.bias == nullptr ? nullptr : weight.bias + row;
        for (int64_t first_tile = 0; first_tile < layout.tiles; first_tile += kBlockTiles) {
            for (int64_t col = 0; col < weight.cols; col += kManyCols) {
                const Range cols{col, std::min(col + kManyCols, weight.cols)};
                const int64_t depth = packed_cols<T>(cols.size()) / kLanes;
                if (first_tile == 0 || weight.cols > kManyCols)
                    transpose_rows<T>(weight, some, cols);
                const auto write = [&](int64_t tile, const float* sums) {
                    const int64_t x_row = (first_tile + tile) * kTileRows;
                    write_tile(sums, bias, std::min<int64_t>(kTileRows, m - x_row), some.size(),
                               y + x_row * y_stride + row, y_stride);
                };
                multiply_passes(packed + layout.at(col, depth, first_tile), depth, layout.block_tiles(first_tile),
                                col == 0, cols.end == weight.cols, write);
            }
        }
    }
}

#define INSTANTIATE(T)                                                                                                 \
    template void pack_many<T>(int64_t, const float*, int64_t, int64_t, Range, float*);                                \
    template void multiply_many<T>(const LinearWeight&, Range, const float*, int64_t, float*, int64_t)
INSTANTIATE(float);
INSTANTIATE(bf16);
INSTANTIATE(f16);

} // namespace fuseline
