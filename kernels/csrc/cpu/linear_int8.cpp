// Linear layers over int8 weights; see linear_quantized.h.
//
// A panel is lines of 64 bytes, each four columns of 16 rows: one operand of VNNI's four-products-per-lane, 16 of them
// one tile of AMX. Packed x: scales [m], then the rounded rows, each padded with zeros to whole panels' columns; for
// AVX2 in groups of kMaxRows rows, the last perhaps smaller: [cols / 4][rows][4].
#include "linear_quantized.h"

#include "dot4.h"
#include "tiles.h"

namespace fuseline {

namespace {

constexpr int64_t kLine = 64, kColStep = 64;

// AVX2 multiplies 16-bit integers, whose products in pairs never overflow; others take bytes. kMaxRows: rows of x that
// a panel meets at once, as many as have their sums in registers.
#if defined(__AVX2__) && !defined(FUSELINE_DOT4)
#define FUSELINE_WIDE 1
typedef int16_t Input;
constexpr int kMaxRows = 6;
#elif defined(FUSELINE_DOT4)
typedef int8_t Input;
constexpr int kMaxRows = kDotBytes == 64 ? 8 : 4;
#else
typedef int8_t Input;
constexpr int kMaxRows = 4;
#endif

// Rows of packed x that a panel of the weight meets while they stay in the second-level cache.
constexpr int64_t kRowBlock = 64 / kMaxRows * kMaxRows;

struct Packed {
    float* scales;
    Input* rows;
    int64_t cols; // padded
    int64_t m;

    Packed(const void* packed, int64_t num_cols, int64_t num_rows) : cols(whole(num_cols, kColStep)), m(num_rows) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int8 only
        scales = reinterpret_cast<float*>(memory);
        rows = reinterpret_cast<Input*>(memory + whole(m * 4, 64));
    }

    // Where four columns of a row lie, the first of them a multiple of 4.
    Input* at(int64_t row, int64_t col) const {
#if defined(FUSELINE_WIDE)
        const int64_t first = row / kMaxRows * kMaxRows;
        return rows + first * cols + col * std::min<int64_t>(kMaxRows, m - first) + (row - first) * 4;
#else
        return rows + row * cols + col;
#endif
    }
};

// Of a row of x with a panel: kSums integers a row of the panel, which are still to be added up.
#if defined(FUSELINE_WIDE)
constexpr int kSums = 2;
#else
constexpr int kSums = 1;
#endif
using Sums = int32_t[kPanelRows * kSums];

// Each multiply_panels<M, Panels> makes sums[panel][row] of M rows of x with panels that follow each other. Several at
// once are as many streams from memory, which a core gets faster than one.

#if defined(FUSELINE_WIDE)

// A single row is as fast as memory, from which a core gets several streams faster than one.
constexpr int panels_at_once(int m) {
    return m == 1 ? 3 : 1;
}

// Columns whose part of a panel stays in the first-level cache from one pass to the next.
constexpr int64_t kChunk = 256;
// How far a panel is fetched ahead, in bytes: the hardware would start anew with each page.
constexpr int64_t kAhead = 4096;

// A line is four vectors of 16-bit integers, four columns of four rows each, whose sums come out in pairs. A pass takes
// Vectors of the four, from First on. Adds columns [chunk.begin, chunk.end) to the sums of M rows of x. Not inlined,
// since GCC then keeps them in registers.
template <int M, int Panels, int Vectors, int First>
__attribute__((noinline)) void add_products(const int8_t* panels, const Input* x, int64_t cols, Range chunk,
                                            Sums* sums) {
    constexpr int kPasses = 4 / Vectors;
    // Of several panels in turn, the next ones.
    const int64_t ahead = Panels == 1 ? kAhead : Panels * cols * kPanelRows;
    __m256i pairs[Panels * M][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Panels * M; ++i)
#pragma GCC unroll 4
        for (int vector = 0; vector < Vectors; ++vector)
            pairs[i][vector] = load_bytes<__m256i>(sums[i] + 8 * (First + vector));
    for (int64_t col = chunk.begin; col < chunk.end; col += 4 * kPasses) {
#pragma GCC unroll 4
        for (int i = 0; i < Panels * kPasses; ++i) {
            const int panel = i / kPasses;
            const int64_t at = col + i % kPasses * 4;
            const int8_t* line = panels + (panel * cols + at) * kPanelRows;
            if (i % kPasses == First / Vectors)
                __builtin_prefetch(line + ahead);
            __m256i w[Vectors];
#pragma GCC unroll 4
            for (int vector = 0; vector < Vectors; ++vector)
                w[vector] = _mm256_cvtepi8_epi16(load_bytes<__m128i>(line + 16 * (First + vector)));
#pragma GCC unroll 8
            for (int row = 0; row < M; ++row) {
                const __m256i input = _mm256_set1_epi64x(load_bytes<int64_t>(x + at * M + 4 * row));
#pragma GCC unroll 4
                for (int vector = 0; vector < Vectors; ++vector) {
                    __m256i& pair = pairs[panel * M + row][vector];
                    pair = _mm256_add_epi32(pair, _mm256_madd_epi16(w[vector], input));
                    // As they stand: in another order of the sums GCC runs out of registers.
                    asm("" : "+x"(pair));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Panels * M; ++i)
#pragma GCC unroll 4
        for (int vector = 0; vector < Vectors; ++vector)
            std::memcpy(sums[i] + 8 * (First + vector), &pairs[i][vector], 32);
}

template <int M, int Panels>
void multiply_panels(const int8_t* panels, const Input* x, int64_t cols, Sums* sums) {
    std::memset(sums, 0, Panels * M * sizeof(Sums));
    if constexpr (M <= 2)
        return add_products<M, Panels, 4, 0>(panels, x, cols, {0, cols}, sums);
    for (int64_t col = 0; col < cols; col += kChunk) {
        const Range chunk{col, std::min(col + kChunk, cols)};
        add_products<M, Panels, 2, 0>(panels, x, cols, chunk, sums);
        add_products<M, Panels, 2, 2>(panels, x, cols, chunk, sums);
    }
}

#elif defined(FUSELINE_DOT4)

constexpr int panels_at_once(int m) {
    return kDotBytes == 64 ? (m <= 2 ? 4 : m <= 4 ? 3 : 2) : (m == 1 ? 3 : 1);
}

// The instruction takes one operand unsigned: x + 128, of which 128 times the sum of w is taken away again.
template <int M, int Panels>
void multiply_panels(const int8_t* panels, const Input* x, int64_t cols, Sums* sums) {
    constexpr int kVectors = kLine / kDotBytes;
    const i32d shift = int32_t(0x80808080u) - i32d{};
    i32d dots[Panels][M][kVectors] = {}, excess[Panels][kVectors] = {};
    for (int64_t col = 0; col < cols; col += 4) {
        i32d w[Panels][kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < Panels * kVectors; ++i) {
            const int panel = i / kVectors, vector = i % kVectors;
            w[panel][vector] = load_bytes<i32d>(panels + (panel * cols + col) * kPanelRows + vector * kDotBytes);
            excess[panel][vector] = dot4(excess[panel][vector], shift, w[panel][vector]);
        }
#pragma GCC unroll 8
        for (int row = 0; row < M; ++row) {
            const i32d input = splat_bytes(x + row * cols + col) ^ shift;
#pragma GCC unroll 8
            for (int i = 0; i < Panels * kVectors; ++i) {
                i32d& dot = dots[i / kVectors][row][i % kVectors];
                dot = dot4(dot, input, w[i / kVectors][i % kVectors]);
            }
        }
    }
    for (int i = 0; i < Panels * M; ++i) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const i32d dot = dots[i / M][i % M][vector] - excess[i / M][vector];
            std::memcpy(sums[i] + vector * kDotLanes, &dot, sizeof dot);
        }
    }
}

#else

constexpr int panels_at_once(int) {
    return 1;
}

template <int M, int Panels>
void multiply_panels(const int8_t* panel, const Input* x, int64_t cols, Sums* sums) {
    static_assert(Panels == 1);
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

// y = sums, each of Parts integers, scaled, plus bias; rows of the weight from `row` on, as many as the panel has.
template <int Parts>
void finish(const LinearWeight& weight, int64_t row, const int32_t* sums, float x_scale, float* y) {
    const auto* scales = static_cast<const float*>(weight.scales) + row;
    const int64_t count = std::min(kPanelRows, weight.rows - row);
    float bias[kPanelRows] = {}, result[kPanelRows];
    if (weight.bias != nullptr)
        std::copy_n(weight.bias + row, count, bias);
    for (int64_t i = 0; i < kPanelRows; ++i) {
        int32_t sum = 0;
        for (int part = 0; part < Parts; ++part)
            sum += sums[i * Parts + part];
        result[i] = float(sum) * (scales[i] * x_scale) + bias[i];
    }
    if (count == kPanelRows)
        std::memcpy(y, result, sizeof result);
    else
        std::copy_n(result, count, y);
}

const int8_t* panel_of(const LinearWeight& weight, int64_t row, int64_t padded_cols) {
    return static_cast<const int8_t*>(weight.data) + row * padded_cols;
}

// Rows of the weight times rows [from.begin, from.begin + M) of x.
template <int M, int Panels>
void multiply_some(const LinearWeight& weight, Range rows, const Packed& x, Range from, float* y, int64_t y_stride) {
    alignas(64) Sums sums[Panels * M];
    int64_t row = rows.begin;
    for (; row + (Panels - 1) * kPanelRows < rows.end; row += Panels * kPanelRows) {
        multiply_panels<M, Panels>(panel_of(weight, row, x.cols), x.at(from.begin, 0), x.cols, sums);
        for (int i = 0; i < Panels * M; ++i) {
            const int64_t at = from.begin + i % M, channel = row + i / M * kPanelRows;
            finish<kSums>(weight, channel, sums[i], x.scales[at], y + at * y_stride + channel);
        }
    }
    if constexpr (Panels > 1) {
        if (row < rows.end)
            multiply_some<M, 1>(weight, {row, rows.end}, x, from, y, y_stride);
    }
}

// The same for up to kMaxRows rows of x; streams: the weight comes from memory.
template <int M = kMaxRows>
void multiply_rows(const LinearWeight& weight, Range rows, const Packed& x, Range from, bool streams, float* y,
                   int64_t y_stride) {
    if constexpr (M > 1) {
        if (from.size() < M)
            return multiply_rows<M - 1>(weight, rows, x, from, streams, y, y_stride);
    }
    if (streams)
        multiply_some<M, panels_at_once(M)>(weight, rows, x, from, y, y_stride);
    else
        multiply_some<M, 1>(weight, rows, x, from, y, y_stride);
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
                    finish<1>(weight, row, sums[i - first], x.scales[i], to);
                    if (two_panels)
                        finish<1>(weight, row + kPanelRows, sums[i - first] + kPanelRows, x.scales[i], to + kPanelRows);
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
        Input rounded[kBlock];
        for (int64_t col = 0; col < to.cols; col += kBlock) {
            round_block(ordered.at(col), inverse(scale), rounded);
            for (int64_t i = 0; i < kBlock; i += 4)
                std::memcpy(to.at(row, col + i), rounded + i, 4 * sizeof(Input));
        }
    }
}

void multiply_int8(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const Packed x(packed, weight.cols, m);
#if defined(FUSELINE_TILES)
    if (m >= kTilesFrom && Tiles::usable())
        return multiply_with_tiles(weight, rows, x, m, y, y_stride);
#endif
    if (m <= kMaxRows)
        return multiply_rows(weight, rows, x, {0, m}, true, y, y_stride);
    for (int64_t block = 0; block < m; block += kRowBlock) {
        const int64_t block_end = std::min(block + kRowBlock, m);
        for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
            for (int64_t first = block; first < block_end; first += kMaxRows) {
                const Range some{first, std::min<int64_t>(first + kMaxRows, block_end)};
                multiply_rows(weight, {row, std::min(row + kPanelRows, rows.end)}, x, some, false, y, y_stride);
            }
        }
    }
}

} // namespace fuseline
