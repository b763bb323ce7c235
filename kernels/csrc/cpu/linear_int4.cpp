// Linear layers over int4 weights; see linear_quantized.h.
//
// A panel is lines of 64 bytes, each eight columns of 16 rows: the first four are the low nibbles of a row's four
// bytes, the last four the high ones. Unsigned nibbles times signed bytes of x are what both AVX2 and VNNI multiply;
// zero points are taken away afterwards, times the sum of a block of x:
//
//     y = sum over blocks of scale(w) scale(x) (sum of w x - zero sum of x)
//
// The integers in it are exact, the sum over blocks runs from the first to the last.
// Packed x: the rounded rows, then scales and sums of their blocks [m, blocks].
#include "linear_quantized.h"

#include "dot4.h"

namespace fuseline {

namespace {

constexpr int64_t kLine = 64, kLinesPerBlock = kBlock / 8;
constexpr int64_t kRowBlock = 64;

struct Packed {
    int8_t* rows; // [m, blocks * kBlock]
    float* scales;
    float* sums;
    int64_t blocks;

    Packed(const void* packed, int64_t cols, int64_t m) : blocks(whole(cols, kBlock) / kBlock) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int4 only
        rows = reinterpret_cast<int8_t*>(memory);
        scales = reinterpret_cast<float*>(memory + whole(m * blocks * kBlock, 64));
        sums = scales + m * blocks;
    }
};

// What a panel consists of.
struct Panel {
    const uint8_t* lines;
    const f16* scales;
    const uint8_t* zeros; // or null: all are 8
};

// Some rows of x: the first, and the distance of the rest.
struct Rows {
    const int8_t* values;
    const float* scales;
    const float* sums;
    int64_t blocks;
};

using Totals = float[kPanelRows];

#if defined(FUSELINE_DOT4)

constexpr int kMaxRows = kDotBytes == 64 ? 8 : 4;
constexpr int kVectors = kLine / kDotBytes;

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

template <int M>
void multiply_panel(const Panel& panel, int64_t group_blocks, const Rows& x, Totals* totals) {
    const i32d mask = 0x0f0f0f0f - i32d{};
    f32d total[M][kVectors] = {};
    for (int64_t block = 0; block < x.blocks;) {
        const int64_t group = block / group_blocks, end = std::min(block + group_blocks, x.blocks);
        f32d scales[kVectors], zeros[kVectors];
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t at = group * kPanelRows + vector * kDotLanes;
            scales[vector] = scales_of(panel.scales + at);
            zeros[vector] = panel.zeros == nullptr ? 8.0f - f32d{} : zeros_of(panel.zeros + at);
        }
        for (; block < end; ++block) {
            i32d dots[M][kVectors] = {};
#pragma GCC unroll 4
            for (int64_t line = 0; line < kLinesPerBlock; ++line) {
                const uint8_t* from = panel.lines + (block * kLinesPerBlock + line) * kLine;
#pragma GCC unroll 2
                for (int vector = 0; vector < kVectors; ++vector) {
                    const i32d bytes = load_bytes<i32d>(from + vector * kDotBytes);
                    const i32d low = bytes & mask, high = (i32d)((u16d)bytes >> 4) & mask;
#pragma GCC unroll 8
                    for (int row = 0; row < M; ++row) {
                        const int8_t* input = x.values + (row * x.blocks + block) * kBlock + line * 8;
                        i32d& dot = dots[row][vector];
                        dot = dot4(dot4(dot, low, splat_bytes(input)), high, splat_bytes(input + 4));
                    }
                }
            }
#pragma GCC unroll 8
            for (int row = 0; row < M; ++row) {
                const int64_t at = row * x.blocks + block;
                for (int vector = 0; vector < kVectors; ++vector) {
                    const f32d dot = __builtin_convertvector(dots[row][vector], f32d);
                    const f32d steps = fma_dot(zeros[vector], -x.sums[at] - f32d{}, dot);
                    total[row][vector] = fma_dot(scales[vector] * x.scales[at], steps, total[row][vector]);
                }
            }
        }
    }
    for (int row = 0; row < M; ++row)
        std::memcpy(totals[row], total[row], sizeof totals[row]);
}

#elif defined(__AVX2__)

constexpr int kMaxRows = 5;

// A block of 32 columns adds up in 16 bits: eight times two products of at most 15 * 127. Both halves of a panel's
// lines are taken at once, or one after the other where more rows of x need registers.
template <int M, int Halves>
void multiply_part(const Panel& panel, int64_t group_blocks, const Rows& x, Totals* totals, int first) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 total[M][Halves];
#pragma GCC unroll 16
    for (int i = 0; i < M * Halves; ++i)
        total[i / Halves][i % Halves] = _mm256_setzero_ps();
    for (int64_t block = 0; block < x.blocks;) {
        const int64_t group = block / group_blocks, end = std::min(block + group_blocks, x.blocks);
        __m256 scales[Halves], zeros[Halves];
#pragma GCC unroll 2
        for (int half = 0; half < Halves; ++half) {
            const int64_t at = group * kPanelRows + (first + half) * 8;
            scales[half] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel.scales + at)));
            zeros[half] = _mm256_set1_ps(8.0f);
            if (panel.zeros != nullptr) {
                const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel.zeros + at));
                zeros[half] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
            }
        }
        for (; block < end; ++block) {
            __m256i dots[M][Halves];
#pragma GCC unroll 16
            for (int i = 0; i < M * Halves; ++i)
                dots[i / Halves][i % Halves] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int64_t line = 0; line < kLinesPerBlock; ++line) {
                const uint8_t* from = panel.lines + (block * kLinesPerBlock + line) * kLine + first * 32;
#pragma GCC unroll 2
                for (int half = 0; half < Halves; ++half) {
                    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half);
                    const __m256i low = _mm256_and_si256(bytes, mask);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
                    for (int row = 0; row < M; ++row) {
                        const int8_t* input = x.values + (row * x.blocks + block) * kBlock + line * 8;
                        const __m256i first_four = _mm256_set1_epi32(load_bytes<int32_t>(input));
                        const __m256i last_four = _mm256_set1_epi32(load_bytes<int32_t>(input + 4));
                        __m256i& dot = dots[row][half];
                        dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(low, first_four));
                        dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(high, last_four));
                    }
                }
            }
#pragma GCC unroll 8
            for (int row = 0; row < M; ++row) {
                const int64_t at = row * x.blocks + block;
                const __m256 x_scale = _mm256_broadcast_ss(x.scales + at), x_sum = _mm256_broadcast_ss(x.sums + at);
#pragma GCC unroll 2
                for (int half = 0; half < Halves; ++half) {
                    const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[row][half], ones));
                    const __m256 steps = _mm256_fnmadd_ps(zeros[half], x_sum, dot);
                    total[row][half] = _mm256_fmadd_ps(_mm256_mul_ps(scales[half], x_scale), steps, total[row][half]);
                }
            }
        }
    }
    for (int row = 0; row < M; ++row) {
        for (int half = 0; half < Halves; ++half)
            _mm256_storeu_ps(totals[row] + (first + half) * 8, total[row][half]);
    }
}

template <int M>
void multiply_panel(const Panel& panel, int64_t group_blocks, const Rows& x, Totals* totals) {
    if constexpr (M <= 2) {
        multiply_part<M, 2>(panel, group_blocks, x, totals, 0);
    } else {
        multiply_part<M, 1>(panel, group_blocks, x, totals, 0);
        multiply_part<M, 1>(panel, group_blocks, x, totals, 1);
    }
}

#else

constexpr int kMaxRows = 4;

template <int M>
void multiply_panel(const Panel& panel, int64_t group_blocks, const Rows& x, Totals* totals) {
    for (int row = 0; row < M; ++row) {
        std::fill_n(totals[row], kPanelRows, 0.0f);
        for (int64_t block = 0; block < x.blocks; ++block) {
            const int64_t at = row * x.blocks + block, group = block / group_blocks;
            int32_t dots[kPanelRows] = {};
            for (int64_t line = 0; line < kLinesPerBlock; ++line) {
                const uint8_t* bytes = panel.lines + (block * kLinesPerBlock + line) * kLine;
                const int8_t* input = x.values + at * kBlock + line * 8;
                for (int i = 0; i < kPanelRows; ++i)
                    for (int j = 0; j < 4; ++j)
                        dots[i] += (bytes[4 * i + j] & 15) * input[j] + (bytes[4 * i + j] >> 4) * input[j + 4];
            }
            for (int i = 0; i < kPanelRows; ++i) {
                const int64_t channel = group * kPanelRows + i;
                const float zero = panel.zeros == nullptr ? 8.0f : float(panel.zeros[channel]);
                const float steps = float(dots[i]) - zero * x.sums[at];
                totals[row][i] += widen(panel.scales[channel]) * x.scales[at] * steps;
            }
        }
    }
}

#endif

template <int M = kMaxRows>
void multiply_panel(const Panel& panel, int64_t group_blocks, const Rows& x, int64_t m, Totals* totals) {
    if constexpr (M > 1) {
        if (m < M)
            return multiply_panel<M - 1>(panel, group_blocks, x, m, totals);
    }
    multiply_panel<M>(panel, group_blocks, x, totals);
}

Panel panel_of(const LinearWeight& weight, int64_t row, int64_t blocks) {
    const int64_t groups = (weight.cols + weight.group - 1) / weight.group;
    return {static_cast<const uint8_t*>(weight.data) + row * blocks * (kBlock / 2),
            static_cast<const f16*>(weight.scales) + row * groups,
            weight.zeros == nullptr ? nullptr : static_cast<const uint8_t*>(weight.zeros) + row * groups};
}

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
            const int64_t at = row * to.blocks + block;
            to.scales[at] = extent.scale();
            to.sums[at] = float(round_block(from, inverse(to.scales[at]), to.rows + at * kBlock));
        }
    }
}

void multiply_int4(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const Packed x(packed, weight.cols, m);
    const int64_t group_blocks = weight.group / kBlock;
    alignas(64) Totals totals[kMaxRows];
    for (int64_t start = 0; start < m; start += kRowBlock) {
        const int64_t end = std::min(start + kRowBlock, m);
        for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
            const Panel panel = panel_of(weight, row, x.blocks);
            const int64_t num_rows = std::min(kPanelRows, weight.rows - row);
            for (int64_t first = start; first < end; first += kMaxRows) {
                const int64_t count = std::min<int64_t>(kMaxRows, end - first), at = first * x.blocks;
                const Rows input{x.rows + at * kBlock, x.scales + at, x.sums + at, x.blocks};
                multiply_panel(panel, group_blocks, input, count, totals);
                for (int64_t i = 0; i < count; ++i) {
                    float* to = y + (first + i) * y_stride + row;
                    for (int64_t j = 0; j < num_rows; ++j)
                        to[j] = totals[i][j] + (weight.bias == nullptr ? 0.0f : weight.bias[row + j]);
                }
            }
        }
    }
}

} // namespace fuseline
