// Float weights rounded to nearest, into panels: what kernels/reference/quantized.py does, to the bit. The formats and
// layouts are defined in kernels/quantized.py.
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "linear.h"
#include "linear_quantized.h"

namespace fuseline {

namespace {

constexpr float kSmallestScale = 0x1p-14f; // of normal float16
constexpr int64_t kInt8Cols = 64;

uint16_t to_f16_bits(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, 0);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) // rounds to more than float16 has
        return uint16_t(sign | 0x7c00);
    // Scales are normal numbers: nothing below 2^-14 comes here.
    const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
    return uint16_t(sign | (rounded - (112u << 23)) >> 13);
#endif
}

// The extremes of n values, zero among them; poison is NaN if one was not finite, else 0.
struct Extremes {
    float low = 0.0f, high = 0.0f, poison = 0.0f;

    void take(const float* values, int64_t n) {
        f32v lows{}, highs{}, bad{};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const f32v x = load(values + i);
            lows = x < lows ? x : lows;
            highs = x > highs ? x : highs;
            bad += x * 0.0f;
        }
        for (int lane = 0; lane < kLanes; ++lane)
            add(lows[lane], highs[lane], bad[lane]);
        for (; i < n; ++i)
            add(values[i], values[i], values[i] * 0.0f);
    }

    void add(float a_low, float a_high, float a_poison) {
        low = a_low < low ? a_low : low;
        high = a_high > high ? a_high : high;
        poison += a_poison;
    }
};

// Values, each operated on by `f`, rounded to integers, ties to even, within [low, high].
template <class F>
void round_values(const float* values, int64_t n, float low, float high, int8_t* to, F&& f) {
    for (int64_t at = 0; at < n; at += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, n - at);
        f32v x{};
        std::memcpy(&x, values + at, count * sizeof(float));
        x = f(x);
        x = x > low ? x : splat(low);
        x = x < high ? x : splat(high);
        const i32v integers = __builtin_convertvector((x + 0x1.8p23f) - 0x1.8p23f, i32v);
        for (int64_t i = 0; i < count; ++i)
            to[at + i] = int8_t(integers[i]);
    }
}

// A row of the weight, widened.
void widen_row(const LinearWeight& weight, int64_t row, float* to) {
    const int64_t at = row * weight.row_stride;
    for (int64_t col = 0; col < weight.cols; ++col) {
        to[col] = weight.dtype == DType::f32    ? static_cast<const float*>(weight.data)[at + col]
                  : weight.dtype == DType::bf16 ? widen(static_cast<const bf16*>(weight.data)[at + col])
                                                : widen(static_cast<const f16*>(weight.data)[at + col]);
    }
}

// Scratch of a worker: one row of floats and 16 of integers, as long as a panel's.
struct Scratch {
    float* values;
    int8_t* integers;
    int64_t cols;

    int8_t* row(int64_t index) const { return integers + index * cols; }
};

void round_panel_int8(const LinearWeight& weight, int64_t panel, const Scratch& scratch, int8_t* data, float* scales) {
    for (int64_t i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        std::memset(scratch.row(i), 0, scratch.cols);
        scales[row] = 0.0f;
        if (row >= weight.rows)
            continue;
        widen_row(weight, row, scratch.values);
        Extremes extremes;
        extremes.take(scratch.values, weight.cols);
        const float largest = std::max(extremes.high, -extremes.low);
        const float scale = (largest < kTiny ? 0.0f : largest / 127.0f) + extremes.poison;
        const float by = inverse(scale);
        scales[row] = scale;
        round_values(scratch.values, weight.cols, -127.0f, 127.0f, scratch.row(i), [by](f32v x) { return x * by; });
    }
    for (int64_t col = 0; col < scratch.cols; col += 4) {
        for (int64_t i = 0; i < kPanelRows; ++i)
            std::memcpy(data + (col * kPanelRows) + i * 4, scratch.row(i) + col, 4);
    }
}

void round_panel_int4(const LinearWeight& weight, int64_t panel, const Scratch& scratch, uint8_t* data,
                      uint16_t* scales, uint8_t* zeros) {
    const int64_t groups = (weight.cols + weight.group - 1) / weight.group;
    for (int64_t i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        std::memset(scratch.row(i), 0, scratch.cols);
        if (row < weight.rows)
            widen_row(weight, row, scratch.values);
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t at = group * kPanelRows + i, first = group * weight.group;
            scales[at] = zeros[at] = 0;
            if (row >= weight.rows)
                continue;
            const int64_t count = std::min(weight.group, weight.cols - first);
            Extremes extremes;
            extremes.take(scratch.values + first, count);
            const float exact = (extremes.high - extremes.low) / 15.0f + extremes.poison;
            scales[at] = to_f16_bits(exact < kSmallestScale ? kSmallestScale : exact);
            const float scale = widen(f16{scales[at]});
            const float zero = std::min(std::max(std::nearbyint(-extremes.low / scale), 0.0f), 15.0f);
            zeros[at] = uint8_t(zero >= 0.0f ? zero : 0.0f);
            round_values(scratch.values + first, count, 0.0f, 15.0f, scratch.row(i) + first, [scale, zero](f32v x) {
                // Rounded before the zero point is added, so that zero stays zero.
                x = x / scale;
                return (x + 0x1.8p23f) - 0x1.8p23f + zero;
            });
        }
    }
    for (int64_t col = 0; col < scratch.cols; col += 8) {
        for (int64_t i = 0; i < kPanelRows; ++i) {
            const int8_t* from = scratch.row(i) + col;
            for (int64_t j = 0; j < 4; ++j)
                data[col / 8 * kPanelRows * 4 + i * 4 + j] = uint8_t(from[j] | from[j + 4] << 4);
        }
    }
}

} // namespace

} // namespace fuseline

using namespace fuseline;

// Bytes of scratch that each worker of fl_cpu_round needs.
extern "C" FUSELINE_EXPORT int64_t fl_cpu_round_scratch_bytes(const LinearWeight* weight) {
    return whole(weight->cols * 4, 64) + kPanelRows * whole(weight->cols, kInt8Cols);
}

// Rounds a float weight [rows, cols] to the int8 or int4 panels of `out`, whose data, scales and zeros are written, on
// the process's team; scratch: fl_cpu_round_scratch_bytes for each worker. out.group is a multiple of kBlock.
extern "C" FUSELINE_EXPORT void fl_cpu_round(const LinearWeight* weight, const LinearWeight* out, char* scratch) {
    const int64_t bytes = fl_cpu_round_scratch_bytes(weight);
    Team::instance().run([&](const Worker& worker) {
        char* memory = scratch + worker.index * bytes;
        const bool int8 = out->dtype == DType::i8;
        const Scratch mine{reinterpret_cast<float*>(memory),
                           reinterpret_cast<int8_t*>(memory + whole(weight->cols * 4, 64)),
                           whole(weight->cols, int8 ? kInt8Cols : kBlock)};
        LinearWeight source = *weight;
        source.group = out->group;
        const Range panels = share(whole(weight->rows, kPanelRows) / kPanelRows, 1, worker);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            char* data = const_cast<char*>(static_cast<const char*>(out->data));
            char* scales = const_cast<char*>(static_cast<const char*>(out->scales));
            if (int8) {
                round_panel_int8(source, panel, mine, reinterpret_cast<int8_t*>(data) + panel * kPanelRows * mine.cols,
                                 reinterpret_cast<float*>(scales));
                continue;
            }
            const int64_t groups = (weight->cols + out->group - 1) / out->group, at = panel * groups * kPanelRows;
            round_panel_int4(source, panel, mine, reinterpret_cast<uint8_t*>(data) + panel * kPanelRows * mine.cols / 2,
                             reinterpret_cast<uint16_t*>(scales) + at,
                             const_cast<uint8_t*>(static_cast<const uint8_t*>(out->zeros)) + at);
        }
    });
}
