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

// Rows of x that a panel meets at once, as many as have their sums in registers.
#if defined(FUSELINE_DOT4)
constexpr int kMaxRows = kDotBytes == 64 ? 8 : 4;
#elif defined(__AVX2__)
constexpr int kMaxRows = 5;
#else
constexpr int kMaxRows = 4;
#endif

// Rows of packed x that a panel of the weight meets while they stay in the second-level cache.
constexpr int64_t kRowBlock = 64;

struct Packed {
    float* scales;
    int8_t* rows;
    int64_t cols; // padded

    Packed(const void* packed, int64_t num_cols, int64_t m) : cols(whole(num_cols, kColStep)) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int8 only
        scales = reinterpret_cast<float*>(memory);
        rows = reinterpret_cast<int8_t*>(memory + whole(m * 4, 64));
    }

    int8_t* row(int64_t index) const { return rows + index * cols; }
};

// Of a row of x with a panel.
using Sums = int32_t[kPanelRows];

// Each multiply_panels<M, Panels> makes sums[panel][row] of M rows of x with panels that follow each other. Several at
// once are as many streams from memory, which a core gets faster than one.

#if defined(FUSELINE_DOT4)

constexpr int panels_at_once(int m) {
    return kDotBytes == 64 ? (m <= 2 ? 4 : m <= 4 ? 3 : 2) : (m == 1 ? 3 : 1);
}

// The instruction takes one operand unsigned: x + 128, of which 128 times the sum of w is taken away again.
template <int M, int Panels>
void multiply_panels(const int8_t* panels, const int8_t* x, int64_t cols, Sums* sums) {
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

#elif defined(__AVX2__)

// One row or two are as fast as memory, from which a core gets several streams faster than one.
constexpr int panels_at_once(int m) {
    return m == 1 ? 3 : m == 2 ? 2 : 1;
}

// How far a panel is fetched ahead, in bytes: the hardware would start anew with each page.
constexpr int64_t kAhead = 4096;

// sum += w * x, four products in each lane; sizes = |w|. The instruction for bytes takes one operand unsigned, the
// magnitude of w, whose sign goes to x; two products of 128 * 127 fit 16 bits. In these words, since GCC's own have
// more temporaries than there are registers.
inline void add_products(__m256i& sum, const int8_t* w, __m256i sizes, __m256i x, __m256i ones) {
    __m256i products;
    asm("vpsignb %2, %3, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "m"(*reinterpret_cast<const __m256i_u*>(w)), "x"(x), "x"(sizes), "x"(ones));
}

template <int M, int Panels>
void multiply_panels(const int8_t* panels, const int8_t* x, int64_t cols, Sums* sums) {
    // Of several panels in turn, the next ones.
    const int64_t ahead = Panels == 1 ? kAhead : Panels * cols * kPanelRows;
    __m256i ones = _mm256_set1_epi16(1), totals[Panels * M][2] = {};
    asm("" : "+x"(ones)); // or GCC reads it from memory each time
    constexpr int kUnroll = 2;
    for (int64_t col = 0; col < cols; col += 4 * kUnroll) {
#pragma GCC unroll 8
        for (int i = 0; i < kUnroll * Panels; ++i) {
            const int panel = i % Panels;
            const int64_t at = col + i / Panels * 4;
            const int8_t* line = panels + (panel * cols + at) * kPanelRows;
            __builtin_prefetch(line + ahead);
            const __m256i sizes[2] = {_mm256_abs_epi8(load_bytes<__m256i>(line)),
                                      _mm256_abs_epi8(load_bytes<__m256i>(line + 32))};
#pragma GCC unroll 8
            for (int row = 0; row < M; ++row) {
                const __m256i input = _mm256_set1_epi32(load_bytes<int32_t>(x + row * cols + at));
                add_products(totals[panel * M + row][0], line, sizes[0], input, ones);
                add_products(totals[panel * M + row][1], line + 32, sizes[1], input, ones);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * Panels * M; ++i)
        std::memcpy(sums[i / 2] + i % 2 * 8, &totals[i / 2][i % 2], sizeof totals[0][0]);
}

#else

constexpr int panels_at_once(int) {
    return 1;
}

template <int M, int Panels>
void multiply_panels(const int8_t* panel, const int8_t* x, int64_t cols, Sums* sums) {
    static_assert(Panels == 1);
    for (int row = 0; row < M; ++row) {
        int32_t total[kPanelRows] = {};
        for (int64_t col = 0; col < cols; col += 4) {
            const int8_t* w = panel + col * kPanelRows;
            const int8_t* input = x + row * cols + col;
            for (int i = 0; i < kPanelRows; ++i)
                total[i] +=
                    w[4 * i] * input[0] + w[4 * i + 1] * input[1] + w[4 * i + 2] * input[2] + w[4 * i + 3] * input[3];
        }
        std::memcpy(sums[row], total, sizeof total);
    }
}

#endif

// y = sums, scaled, plus bias, of rows [from.begin, from.end) of x with one panel; rows of the weight from `row` on, as
// many as the panel has. Sums of a row of x lie sums_stride after those of the one before.
void finish(const LinearWeight& weight, int64_t row, const Packed& x, Range from, const int32_t* sums,
            int64_t sums_stride, float* y, int64_t y_stride) {
    const float* scales = static_cast<const float*>(weight.scales) + row;
    const int64_t count = std::min(kPanelRows, weight.rows - row);
    float bias[kPanelRows] = {}, last[kPanelRows];
    if (weight.bias != nullptr)
        std::copy_n(weight.bias + row, count, bias);
    for (int64_t at = from.begin; at < from.end; ++at, sums += sums_stride) {
        float* const to = y + at * y_stride + row;
        float* const whole_panel = count == kPanelRows ? to : last;
        for (int64_t i = 0; i < kPanelRows; i += kLanes) {
            const f32v sum = __builtin_convertvector(load_bytes<i32v>(sums + i), f32v);
            store(whole_panel + i, sum * (load(scales + i) * x.scales[at]) + load(bias + i));
        }
        if (count != kPanelRows)
            std::copy_n(last, count, to);
    }
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
        multiply_panels<M, Panels>(panel_of(weight, row, x.cols), x.row(from.begin), x.cols, sums);
        for (int i = 0; i < Panels; ++i)
            finish(weight, row + i * kPanelRows, x, from, sums[i * M], kPanelRows, y, y_stride);
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
void multiply_tiles(Tiles& tiles, const int8_t* const* panels, const int8_t* x, int64_t cols, int32_t* sums) {
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
            const int num_panels = row + kPanelRows < rows.end ? 2 : 1;
            const int8_t* panels[] = {panel_of(weight, row, x.cols),
                                      num_panels == 2 ? panel_of(weight, row + kPanelRows, x.cols) : nullptr};
            for (int64_t first = block; first < block_end; first += 2 * kTileRows) {
                const int8_t* input = x.row(first);
                const bool two_tiles = first + kTileRows < block_end;
                auto* multiply = num_panels == 2 ? (two_tiles ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)
                                                 : (two_tiles ? multiply_tiles<2, 1> : multiply_tiles<1, 1>);
                multiply(tiles, panels, input, x.cols, sums[0]);
                const Range some{first, std::min(first + 2 * kTileRows, block_end)};
                for (int i = 0; i < num_panels; ++i)
                    finish(weight, row + i * kPanelRows, x, some, sums[0] + i * kPanelRows, 2 * kPanelRows, y,
                           y_stride);
            }
        }
    }
}

#endif

} // namespace

int64_t int8_packed_bytes(int64_t cols, int64_t m) {
    // Tiles read rows by sixteens, though they keep no more than there are.
    return whole(m * 4, 64) + whole(m, kPanelRows) * whole(cols, kColStep);
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
        const float scale = extent.scale(), by = inverse(scale);
        to.scales[row] = scale;
        for (int64_t col = 0; col < to.cols; col += kBlock)
            round_block(ordered.at(col), by, to.row(row) + col);
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
        const int64_t size = std::min(kRowBlock, m - block), groups = whole(size, kMaxRows) / kMaxRows;
        for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
            for (int64_t group = 0; group < groups; ++group) {
                const Range some{block + group * size / groups, block + (group + 1) * size / groups};
                multiply_rows(weight, {row, std::min(row + kPanelRows, rows.end)}, x, some, false, y, y_stride);
            }
        }
    }
}

} // namespace fuseline
