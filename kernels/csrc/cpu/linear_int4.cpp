// Linear layers over int4 weights; see linear_quantized.h.
//
// A panel is lines of 64 bytes, each eight columns of 16 rows: the first four are the low nibbles of a row's four
// bytes, the last four the high ones. Unsigned nibbles times signed bytes of x are what both AVX2 and VNNI multiply;
// zero points are taken away afterwards, times the sum of a block of x:
//
//     y = sum over blocks of scale(w) scale(x) (sum of w x - zero sum of x)
//
// The integers in it are exact, the sum over blocks runs from the first to the last. A block of a panel is unpacked
// into registers, where it meets some rows of x, whose totals wait in the first-level cache.
//
// Packed x: groups of kRowsAtOnce rows, the last perhaps smaller; in each the rounded values [blocks][rows][kBlock].
// Then the blocks' scales and sums, in the same order.
#include "linear_quantized.h"

#include "dot4.h"

namespace fuseline {

namespace {

constexpr int64_t kLine = 64, kLinesPerBlock = kBlock / 8, kBlockBytes = kLinesPerBlock * kLine;
// Rows of x that a panel meets while it stays in the first-level cache.
constexpr int64_t kRowBlock = 64;
// How far weights are fetched ahead: the hardware would start anew with each page.
constexpr int64_t kAhead = 4096;
constexpr int kDefaultZero = 8;

// Rows of x that an unpacked block of a panel meets. AVX2 has the sums of so many, of both halves of a panel, in
// registers; where instructions are fewer than registers, rows take turns instead.
#if defined(__AVX2__) && !defined(FUSELINE_DOT4)
constexpr int kRowsAtOnce = 4;
constexpr bool kUnrolled = true;
#else
constexpr int kRowsAtOnce = 64;
constexpr bool kUnrolled = false;
#endif

struct Packed {
    int8_t* values;
    float* scales;
    float* sums;
    int64_t blocks, m;

    Packed(const void* packed, int64_t cols, int64_t rows) : blocks(whole(cols, kBlock) / kBlock), m(rows) {
        char* memory = const_cast<char*>(static_cast<const char*>(packed)); // written by pack_int4 only
        values = reinterpret_cast<int8_t*>(memory);
        scales = reinterpret_cast<float*>(memory + whole(m * blocks * kBlock, 64));
        sums = scales + m * blocks;
    }

    // Where a block of a row lies.
    int64_t at(int64_t row, int64_t block) const {
        const int64_t first = row / kRowsAtOnce * kRowsAtOnce;
        return first * blocks + block * std::min<int64_t>(kRowsAtOnce, m - first) + row - first;
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
template <int>
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

// The nibbles of both halves of a line, low or high, times four bytes of each row of x. Eight times two products of at
// most 15 * 127 fit into 16 bits.
template <int M>
inline void add_products(const __m256i (&w)[2], const int8_t* input, __m256i (&dots)[M][2]) {
#pragma GCC unroll 4
    for (int row = 0; row < M; ++row) {
        const __m256i four = _mm256_set1_epi32(load_bytes<int32_t>(input + row * kBlock));
        dots[row][0] = _mm256_add_epi16(dots[row][0], _mm256_maddubs_epi16(w[0], four));
        dots[row][1] = _mm256_add_epi16(dots[row][1], _mm256_maddubs_epi16(w[1], four));
        // As they stand: in another order of the sums GCC runs out of registers.
        asm("" : "+x"(dots[row][0]), "+x"(dots[row][1]));
    }
}

// The same; x has M rows.
template <int M>
inline void multiply_block(const PanelBlock& panel, const InputBlock& x, Totals* totals) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i dots[M][2] = {};
#pragma GCC unroll 4
    for (int64_t line = 0; line < kLinesPerBlock; ++line) {
        const __m256i first = load_bytes<__m256i>(panel.lines + line * kLine);
        const __m256i second = load_bytes<__m256i>(panel.lines + line * kLine + 32);
        const __m256i low[] = {_mm256_and_si256(first, mask), _mm256_and_si256(second, mask)};
        add_products(low, x.values + 8 * line, dots);
        const __m256i high[] = {_mm256_and_si256(_mm256_srli_epi16(first, 4), mask),
                                _mm256_and_si256(_mm256_srli_epi16(second, 4), mask)};
        add_products(high, x.values + 8 * line + 4, dots);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m256 scales = _mm256_cvtph_ps(load_bytes<__m128i>(panel.scales + 8 * half));
        __m256 zeros = _mm256_set1_ps(kDefaultZero);
        if (panel.zeros != nullptr) {
            const __m128i bytes = _mm_cvtsi64_si128(load_bytes<int64_t>(panel.zeros + 8 * half));
            zeros = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        }
#pragma GCC unroll 4
        for (int row = 0; row < M; ++row) {
            const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[row][half], ones));
            const __m256 steps = _mm256_fnmadd_ps(zeros, _mm256_broadcast_ss(x.sums + row), dot);
            const __m256 scaled = _mm256_mul_ps(scales, _mm256_broadcast_ss(x.scales + row));
            float* total = totals[row] + 8 * half;
            _mm256_store_ps(total, _mm256_fmadd_ps(scaled, steps, _mm256_load_ps(total)));
        }
    }
}

#else

// The same.
template <int>
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

// A panel, whose first row is `row` of the weight, times rows `some` of x: M, or up to M where they take turns. Not
// inlined, since GCC then keeps sums in registers.
template <int M>
__attribute__((noinline)) void multiply_panel(const LinearWeight& weight, int64_t row, const Packed& x, Range some,
                                              float* y, int64_t y_stride) {
    const int64_t panel = row / kPanelRows, group_blocks = weight.group / kBlock;
    const int64_t groups = (x.blocks + group_blocks - 1) / group_blocks;
    const auto* lines = static_cast<const uint8_t*>(weight.data) + panel * x.blocks * kBlockBytes;
    const auto* scales = static_cast<const f16*>(weight.scales) + panel * groups * kPanelRows;
    const auto* zeros = static_cast<const uint8_t*>(weight.zeros);
    zeros += zeros == nullptr ? 0 : panel * groups * kPanelRows;
    alignas(64) Totals totals[M];
    const int64_t start = x.at(some.begin, 0), count = kUnrolled ? M : some.size();
    InputBlock input{x.values + start * kBlock, x.scales + start, x.sums + start, count};
    std::memset(totals, 0, count * sizeof(Totals));
    int64_t left = group_blocks;
    for (int64_t block = 0; block < x.blocks; ++block) {
        for (int64_t line = 0; line < kLinesPerBlock; ++line)
            __builtin_prefetch(lines + kAhead + line * kLine);
        multiply_block<M>({lines, scales, zeros}, input, totals);
        lines += kBlockBytes;
        input.values += count * kBlock;
        input.scales += count;
        input.sums += count;
        if (--left == 0) {
            left = group_blocks;
            scales += kPanelRows;
            zeros += zeros == nullptr ? 0 : kPanelRows;
        }
    }
    const int64_t channels = std::min(kPanelRows, weight.rows - row);
    alignas(64) Totals bias{};
    if (weight.bias != nullptr)
        std::copy_n(weight.bias + row, channels, bias);
    for (int64_t i = 0; i < some.size(); ++i) {
        float* to = y + (some.begin + i) * y_stride + row;
        for (int64_t j = 0; j < kPanelRows; ++j)
            totals[i][j] += bias[j];
        if (channels == kPanelRows)
            std::memcpy(to, totals[i], sizeof(Totals));
        else
            std::copy_n(totals[i], channels, to);
    }
}

template <int M = kRowsAtOnce>
void multiply_rows(const LinearWeight& weight, int64_t row, const Packed& x, Range some, float* y, int64_t y_stride) {
    if constexpr (kUnrolled && M > 1) {
        if (some.size() < M)
            return multiply_rows<M - 1>(weight, row, x, some, y, y_stride);
    }
    multiply_panel<M>(weight, row, x, some, y, y_stride);
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
            const int64_t at = to.at(row, block);
            to.scales[at] = extent.scale();
            to.sums[at] = float(round_block(from, inverse(to.scales[at]), to.values + at * kBlock));
        }
    }
}

void multiply_int4(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const Packed x(packed, weight.cols, m);
    for (int64_t block = 0; block < m; block += kRowBlock) {
        const int64_t block_end = std::min(block + kRowBlock, m);
        for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
            for (int64_t first = block; first < block_end; first += kRowsAtOnce)
                multiply_rows(weight, row, x, {first, std::min(first + kRowsAtOnce, block_end)}, y, y_stride);
        }
    }
}

} // namespace fuseline
