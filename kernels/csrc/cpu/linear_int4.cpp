// Linear layers over int4 weights; see linear_quantized.h.
//
// A panel is lines of 64 bytes, each eight columns of 16 rows: the first four are the low nibbles of a row's four
// bytes, the last four the high ones. Unsigned nibbles times signed bytes of x are what both AVX2 and VNNI multiply;
// zero points are taken away afterwards, times the sum of a block of x:
//
//     y = sum over blocks of scale(w) scale(x) (sum of w x - zero sum of x)
//
// The integers in it are exact, the sum over blocks runs from the first to the last. A block of a panel is unpacked
// into registers, where it meets all rows of x, whose totals wait in the first-level cache.
//
// Packed x: the rounded values [blocks][m][kBlock], then scales and sums [blocks][m] of blocks.
#include "linear_quantized.h"

#include "dot4.h"

namespace fuseline {

namespace {

constexpr int64_t kLine = 64, kLinesPerBlock = kBlock / 8, kBlockBytes = kLinesPerBlock * kLine;
// Rows of x that a block of a panel meets.
constexpr int64_t kRowBlock = 64;
// Up to so many rows of x, weights are read at the speed of memory: from several panels in turn, since a core gets
// several streams faster than one.
constexpr int64_t kStreamRows = 4, kStreams = 3;
constexpr int kDefaultZero = 8;

struct Packed {
    int8_t* values;
    float* scales;
    float* sums;
    int64_t blocks;

    Packed(const void* packed, int64_t cols, int64_t m) : blocks(whole(cols, kBlock) / kBlock) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int4 only
        values = reinterpret_cast<int8_t*>(memory);
        scales = reinterpret_cast<float*>(memory + whole(m * blocks * kBlock, 64));
        sums = scales + m * blocks;
    }
};

// One block of columns: of a panel, and of some rows of x.
struct PanelBlock {
    const uint8_t* lines;
    const f16* scales;
    const uint8_t* zeros; // or null: all are 8
};
struct InputBlock {
    const int8_t* values;
    const float* scales;
    const float* sums;
    int64_t rows;
};

using Totals = float[kPanelRows];

#if defined(FUSELINE_DOT4)

inline f32d scales_of(const f16* from) {
#if defined(FUSELINE_EMULATE_DOT4)
    f32d scales;
    for (int lane = 0; lane < kDotLanes; ++lane)
        scales[lane] = widen(from[lane]);
    return scales;
#else
    return (f32d)load(from);
#endif
}

inline f32d zeros_of(const uint8_t* from) {
    typedef uint8_t bytes __attribute__((vector_size(kDotLanes)));
    return __builtin_convertvector(load_bytes<bytes>(from), f32d);
}

// totals[row] += this block's part, for all rows of x.
void multiply_block(const PanelBlock& panel, const InputBlock& x, Totals* totals) {
    const i32d mask = 0x0f0f0f0f - i32d{};
    for (int64_t first = 0; first < kPanelRows; first += kDotLanes) {
        i32d w[2 * kLinesPerBlock];
#pragma GCC unroll 4
        for (int64_t line = 0; line < kLinesPerBlock; ++line) {
            const i32d bytes = load_bytes<i32d>(panel.lines + line * kLine + first * 4);
            w[2 * line] = bytes & mask;
            w[2 * line + 1] = (i32d)((u16d)bytes >> 4) & mask;
        }
        const f32d scales = scales_of(panel.scales + first);
        const f32d zeros = panel.zeros == nullptr ? float(kDefaultZero) - f32d{} : zeros_of(panel.zeros + first);
        for (int64_t row = 0; row < x.rows; ++row) {
            const int8_t* input = x.values + row * kBlock;
            i32d dots[2] = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < 2 * kLinesPerBlock; ++i)
                dots[i % 2] = dot4(dots[i % 2], w[i], splat_bytes(input + 4 * i));
            const f32d dot = __builtin_convertvector(dots[0] + dots[1], f32d);
            const f32d steps = fma_dot(zeros, -x.sums[row] - f32d{}, dot);
            const f32d total = fma_dot(scales * x.scales[row], steps, load_bytes<f32d>(totals[row] + first));
            std::memcpy(totals[row] + first, &total, sizeof total);
        }
    }
}

#elif defined(__AVX2__)

// The same. Eight times two products of at most 15 * 127 fit into 16 bits.
void multiply_block(const PanelBlock& panel, const InputBlock& x, Totals* totals) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t first = 0; first < kPanelRows; first += 8) {
        __m256i w[2 * kLinesPerBlock];
#pragma GCC unroll 4
        for (int64_t line = 0; line < kLinesPerBlock; ++line) {
            const uint8_t* from = panel.lines + line * kLine + first * 4;
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            w[2 * line] = _mm256_and_si256(bytes, mask);
            w[2 * line + 1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        }
        const __m256 scales = _mm256_cvtph_ps(load_bytes<__m128i>(panel.scales + first));
        __m256 zeros = _mm256_set1_ps(kDefaultZero);
        if (panel.zeros != nullptr) {
            const __m128i bytes = _mm_cvtsi64_si128(load_bytes<int64_t>(panel.zeros + first));
            zeros = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        }
        for (int64_t row = 0; row < x.rows; ++row) {
            const int8_t* input = x.values + row * kBlock;
            __m256i dots[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
            for (int64_t i = 0; i < 2 * kLinesPerBlock; ++i) {
                const __m256i four = _mm256_set1_epi32(load_bytes<int32_t>(input + 4 * i));
                dots[i % 2] = _mm256_add_epi16(dots[i % 2], _mm256_maddubs_epi16(w[i], four));
            }
            const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_add_epi16(dots[0], dots[1]), ones));
            const __m256 steps = _mm256_fnmadd_ps(zeros, _mm256_broadcast_ss(x.sums + row), dot);
            const __m256 scaled = _mm256_mul_ps(scales, _mm256_broadcast_ss(x.scales + row));
            float* total = totals[row] + first;
            _mm256_storeu_ps(total, _mm256_fmadd_ps(scaled, steps, _mm256_loadu_ps(total)));
        }
    }
}

#else

void multiply_block(const PanelBlock& panel, const InputBlock& x, Totals* totals) {
    for (int64_t row = 0; row < x.rows; ++row) {
        int32_t dots[kPanelRows] = {};
        for (int64_t line = 0; line < kLinesPerBlock; ++line) {
            const uint8_t* bytes = panel.lines + line * kLine;
            const int8_t* input = x.values + row * kBlock + line * 8;
            for (int i = 0; i < kPanelRows; ++i) {
                for (int j = 0; j < 4; ++j)
                    dots[i] += (bytes[4 * i + j] & 15) * input[j] + (bytes[4 * i + j] >> 4) * input[j + 4];
            }
        }
        for (int i = 0; i < kPanelRows; ++i) {
            const float zero = panel.zeros == nullptr ? float(kDefaultZero) : float(panel.zeros[i]);
            totals[row][i] += widen(panel.scales[i]) * x.scales[row] * (float(dots[i]) - zero * x.sums[row]);
        }
    }
}

#endif

} // namespace

int64_t int4_packed_bytes(int64_t cols, int64_t m) {
    const int64_t padded = whole(cols, kBlock);
    return whole(m * padded, 64) + m * padded / kBlock * 2 * int64_t(sizeof(float));
}

void pack_int4(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    const Packed to(packed, weight.cols, m);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        RowBlocks values(x + row * x_stride, weight);
        for (int64_t block = 0; block < to.blocks; ++block) {
            const float* from = values.at(block * kBlock);
            Extent extent;
            extent.take(from);
            const int64_t at = block * m + row;
            to.scales[at] = extent.scale();
            to.sums[at] = float(round_block(from, inverse(to.scales[at]), to.values + at * kBlock));
        }
    }
}

void multiply_int4(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const Packed x(packed, weight.cols, m);
    const auto* lines = static_cast<const uint8_t*>(weight.data);
    const auto* scales = static_cast<const f16*>(weight.scales);
    const auto* zeros = static_cast<const uint8_t*>(weight.zeros);
    const int64_t group_blocks = weight.group / kBlock, groups = (x.blocks + group_blocks - 1) / group_blocks;
    const int64_t streams = m <= kStreamRows ? kStreams : 1;
    alignas(64) Totals totals[std::max(kStreams * kStreamRows, kRowBlock)];
    for (int64_t first = 0; first < m; first += kRowBlock) {
        const int64_t count = std::min(kRowBlock, m - first);
        for (int64_t row = rows.begin; row < rows.end; row += streams * kPanelRows) {
            const int64_t panel = row / kPanelRows;
            const int64_t panels = std::min(streams, whole(rows.end - row, kPanelRows) / kPanelRows);
            std::memset(totals, 0, panels * count * sizeof(Totals));
            for (int64_t block = 0; block < x.blocks; ++block) {
                const int64_t at = block * m + first;
                const InputBlock input{x.values + at * kBlock, x.scales + at, x.sums + at, count};
                for (int64_t i = 0; i < panels; ++i) {
                    const int64_t group = ((panel + i) * groups + block / group_blocks) * kPanelRows;
                    multiply_block({lines + ((panel + i) * x.blocks + block) * kBlockBytes, scales + group,
                                    zeros == nullptr ? nullptr : zeros + group},
                                   input, totals + i * count);
                }
            }
            for (int64_t i = 0; i < panels * count; ++i) {
                const int64_t channel = row + i / count * kPanelRows;
                float* to = y + (first + i % count) * y_stride + channel;
                for (int64_t j = 0; j < std::min(kPanelRows, weight.rows - channel); ++j)
                    to[j] = totals[i][j] + (weight.bias == nullptr ? 0.0f : weight.bias[channel + j]);
            }
        }
    }
}

} // namespace fuseline
