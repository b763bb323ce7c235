// Linear layers over int8 weights; see linear_quantized.h.
//
// A panel is lines of 64 bytes, each four columns of 16 rows: one operand of VNNI's four-products-per-lane, 16 of them
// one tile of AMX. Packed x: scales [m], then the rounded rows, each padded with zeros to whole panels' columns.
#include "linear_quantized.h"

#include "dot4.h"
#include "tiles.h"

namespace fuseline {

namespace {

constexpr int64_t kLine = 64, kColStep = 64;
// Rows of packed x that a panel of the weight meets while they stay in the second-level cache.
constexpr int64_t kRowBlock = 64;

// AVX2 multiplies 16-bit integers, whose products in pairs never overflow; others take bytes.
#if defined(__AVX2__) && !defined(FUSELINE_DOT4)
#define FUSELINE_WIDE 1
typedef int16_t Input;
#else
typedef int8_t Input;
#endif

struct Packed {
    float* scales;
    Input* rows;
    int64_t cols; // padded, the distance of rows

    Packed(const void* packed, int64_t num_cols, int64_t m) : cols(whole(num_cols, kColStep)) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int8 only
        scales = reinterpret_cast<float*>(memory);
        rows = reinterpret_cast<Input*>(memory + whole(m * 4, 64));
    }
};

using Sums = int32_t[kPanelRows];

#if defined(FUSELINE_WIDE)

// Products of M rows of x with one panel. A line is four vectors of 16-bit integers, four columns of four rows each,
// whose sums come out in pairs. Lines are taken whole, or in two passes by halves where more rows of x need registers.
template <int M, int Vectors>
void multiply_part(const int8_t* panel, const Input* x, int64_t cols, Sums* sums, int first) {
    __m256i pairs[M][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < M * Vectors; ++i)
        pairs[i / Vectors][i % Vectors] = _mm256_setzero_si256();
    for (int64_t col = 0; col < cols; col += 4) {
        const auto* line = reinterpret_cast<const __m128i*>(panel + col * kPanelRows) + first;
        __m256i w[Vectors];
#pragma GCC unroll 4
        for (int vector = 0; vector < Vectors; ++vector)
            w[vector] = _mm256_cvtepi8_epi16(_mm_loadu_si128(line + vector));
#pragma GCC unroll 8
        for (int row = 0; row < M; ++row) {
            const __m256i input = _mm256_set1_epi64x(load_bytes<int64_t>(x + row * cols + col));
#pragma GCC unroll 4
            for (int vector = 0; vector < Vectors; ++vector) {
                const __m256i products = _mm256_madd_epi16(w[vector], input);
                pairs[row][vector] = _mm256_add_epi32(pairs[row][vector], products);
            }
        }
    }
    for (int row = 0; row < M; ++row) {
#pragma GCC unroll 2
        for (int vector = 0; vector < Vectors; vector += 2) {
            const __m256i mixed = _mm256_hadd_epi32(pairs[row][vector], pairs[row][vector + 1]);
            auto* to = reinterpret_cast<__m256i*>(sums[row] + 4 * (first + vector));
            _mm256_storeu_si256(to, _mm256_permute4x64_epi64(mixed, 0xd8));
        }
    }
}

constexpr int kMaxRows = 6;

template <int M>
void multiply_panel(const int8_t* panel, const Input* x, int64_t cols, Sums* sums) {
    if constexpr (M <= 2) {
        multiply_part<M, 4>(panel, x, cols, sums, 0);
    } else {
        multiply_part<M, 2>(panel, x, cols, sums, 0);
        multiply_part<M, 2>(panel, x, cols, sums, 2);
    }
}

#elif defined(FUSELINE_DOT4)

constexpr int kMaxRows = kDotBytes == 64 ? 8 : 4;

// The instruction takes one operand unsigned: x + 128, of which 128 times the sum of w is taken away again.
template <int M>
void multiply_panel(const int8_t* panel, const Input* x, int64_t cols, Sums* sums) {
    constexpr int kVectors = kLine / kDotBytes;
    constexpr int32_t kFlip = int32_t(0x80808080u);
    const i32d shift = kFlip - i32d{};
    i32d dots[M][kVectors] = {}, excess[kVectors] = {};
    for (int64_t col = 0; col < cols; col += 4) {
        i32d w[kVectors];
#pragma GCC unroll 2
        for (int vector = 0; vector < kVectors; ++vector) {
            w[vector] = load_bytes<i32d>(panel + col * kPanelRows + vector * kDotBytes);
            excess[vector] = dot4(excess[vector], shift, w[vector]);
        }
#pragma GCC unroll 8
        for (int row = 0; row < M; ++row) {
            const i32d input = splat_bytes(x + row * cols + col) ^ shift;
#pragma GCC unroll 2
            for (int vector = 0; vector < kVectors; ++vector)
                dots[row][vector] = dot4(dots[row][vector], input, w[vector]);
        }
    }
    for (int row = 0; row < M; ++row) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const i32d dot = dots[row][vector] - excess[vector];
            std::memcpy(sums[row] + vector * kDotLanes, &dot, sizeof dot);
        }
    }
}

#else

constexpr int kMaxRows = 4;

template <int M>
void multiply_panel(const int8_t* panel, const Input* x, int64_t cols, Sums* sums) {
    for (int row = 0; row < M; ++row) {
        int32_t total[kPanelRows] = {};
        for (int64_t col = 0; col < cols; col += 4) {
            const int8_t* w = panel + col * kPanelRows;
            const Input* input = x + row * cols + col;
            for (int i = 0; i < kPanelRows; ++i)
                total[i] +=
                    w[4 * i] * input[0] + w[4 * i + 1] * input[1] + w[4 * i + 2] * input[2] + w[4 * i + 3] * input[3];
        }
        std::memcpy(sums[row], total, sizeof total);
    }
}

#endif

template <int M = kMaxRows>
void multiply_panel(const int8_t* panel, const Input* x, int64_t cols, int64_t m, Sums* sums) {
    if constexpr (M > 1) {
        if (m < M)
            return multiply_panel<M - 1>(panel, x, cols, m, sums);
    }
    multiply_panel<M>(panel, x, cols, sums);
}

// y = sums, scaled, plus bias; rows of the weight from `row` on, as many as the panel has.
void finish(const LinearWeight& weight, int64_t row, const int32_t* sums, float x_scale, float* y) {
    const auto* scales = static_cast<const float*>(weight.scales) + row;
    const int64_t count = std::min(kPanelRows, weight.rows - row);
    for (int64_t i = 0; i < count; ++i)
        y[i] = float(sums[i]) * (scales[i] * x_scale) + (weight.bias == nullptr ? 0.0f : weight.bias[row + i]);
}

const int8_t* panel_of(const LinearWeight& weight, int64_t row, int64_t padded_cols) {
    return static_cast<const int8_t*>(weight.data) + row * padded_cols;
}

#if defined(FUSELINE_TILES)

// Rows of x from which on tiles pay.
constexpr int64_t kTilesFrom = 5;

// Tiles 0 to 3: sums of two times 16 rows of x with two panels. 4, 5: x; 6, 7: the panels.
template <int XTiles, int Panels>
void multiply_tiles(Tiles& tiles, const int8_t* const* panels, const Input* x, int64_t cols, int32_t* sums) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    for (int64_t col = 0; col < cols; col += kTileBytes) {
        tiles.load<4>(x + col, cols);
        tiles.load<6>(panels[0] + col * kPanelRows, kTileBytes);
        tiles.multiply<0, 4, 6>();
        if constexpr (Panels == 2) {
            tiles.load<7>(panels[1] + col * kPanelRows, kTileBytes);
            tiles.multiply<1, 4, 7>();
        }
        if constexpr (XTiles == 2) {
            tiles.load<5>(x + kTileRows * cols + col, cols);
            tiles.multiply<2, 5, 6>();
            if constexpr (Panels == 2)
                tiles.multiply<3, 5, 7>();
        }
    }
    constexpr int64_t kStride = 2 * kPanelRows;
    tiles.store<0>(sums, kStride * 4);
    tiles.store<1>(sums + kPanelRows, kStride * 4);
    tiles.store<2>(sums + kTileRows * kStride, kStride * 4);
    tiles.store<3>(sums + kTileRows * kStride + kPanelRows, kStride * 4);
}

void multiply_with_tiles(const LinearWeight& weight, Range rows, const Packed& x, int64_t m, float* y,
                         int64_t y_stride) {
    Tiles tiles;
    alignas(64) int32_t sums[2 * kTileRows][2 * kPanelRows];
    for (int64_t block = 0; block < m; block += kRowBlock) {
        const int64_t block_end = std::min(block + kRowBlock, m);
        for (int64_t row = rows.begin; row < rows.end; row += 2 * kPanelRows) {
            const bool two_panels = row + kPanelRows < rows.end;
            const int8_t* panels[] = {panel_of(weight, row, x.cols),
                                      two_panels ? panel_of(weight, row + kPanelRows, x.cols) : nullptr};
            for (int64_t first = block; first < block_end; first += 2 * kTileRows) {
                const Input* input = x.rows + first * x.cols;
                const bool two_tiles = first + kTileRows < block_end;
                auto* multiply = two_panels ? (two_tiles ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)
                                            : (two_tiles ? multiply_tiles<2, 1> : multiply_tiles<1, 1>);
                multiply(tiles, panels, input, x.cols, sums[0]);
                for (int64_t i = first; i < std::min(first + 2 * kTileRows, block_end); ++i) {
                    float* to = y + i * y_stride + row;
                    finish(weight, row, sums[i - first], x.scales[i], to);
                    if (two_panels)
                        finish(weight, row + kPanelRows, sums[i - first] + kPanelRows, x.scales[i], to + kPanelRows);
                }
            }
        }
    }
}

#endif

} // namespace

int64_t int8_packed_bytes(int64_t cols, int64_t m) {
    // Tiles read rows by sixteens, though they keep no more than there are.
    return whole(m * 4, 64) + whole(m, kPanelRows) * whole(cols, kColStep) * int64_t(sizeof(Input));
}

void pack_int8(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    const Packed to(packed, weight.cols, m);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float* from = x + row * x_stride;
        LinearWeight unordered = weight;
        unordered.order = nullptr;
        RowBlocks values(from, unordered), ordered(from, weight);
        Extent extent;
        for (int64_t col = 0; col < weight.cols; col += kBlock)
            extent.take(values.at(col));
        const float scale = extent.scale();
        to.scales[row] = scale;
        for (int64_t col = 0; col < to.cols; col += kBlock)
            round_block(ordered.at(col), inverse(scale), to.rows + row * to.cols + col);
    }
}

void multiply_int8(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const Packed x(packed, weight.cols, m);
#if defined(FUSELINE_TILES)
    if (m >= kTilesFrom && Tiles::usable())
        return multiply_with_tiles(weight, rows, x, m, y, y_stride);
#endif
    alignas(64) Sums sums[kMaxRows];
    for (int64_t block = 0; block < m; block += kRowBlock) {
        const int64_t block_end = std::min(block + kRowBlock, m);
        for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
            const int8_t* panel = panel_of(weight, row, x.cols);
            for (int64_t first = block; first < block_end; first += kMaxRows) {
                const int64_t count = std::min<int64_t>(kMaxRows, block_end - first);
                multiply_panel(panel, x.rows + first * x.cols, x.cols, count, sums);
                for (int64_t i = 0; i < count; ++i)
                    finish(weight, row, sums[i], x.scales[first + i], y + (first + i) * y_stride + row);
            }
        }
    }
}

} // namespace fuseline
