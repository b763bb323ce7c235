// y^T = W x^T in tiles: 16 rows of W by 32 columns straight from the checkpoint's layout, times 32 columns of 16 rows
// of x, which packing has put in pairs. Each element of y has its place in a tile and adds its pairs of columns in
// order; a batch of one fills one column of sixteen, which costs nothing: it is the reading of W that takes the time.
//
// Packed x: [blocks of 16 rows][blocks of 32 columns][16 pairs of columns][16 rows][2], zeros beyond cols and m.
#include "linear_tiles.h"

#include "isa.h"

namespace fuseline {

#ifdef FUSELINE_TILES

namespace {

constexpr int64_t kSide = kTileRows, kDepth = kTileBytes / 2, kTileElements = kSide * kDepth;
// Of packed x, to stay in the second-level cache while rows of W go past.
constexpr int64_t kGroupBytes = 768 * 1024;
// How far ahead of its use W is fetched, in bytes along a row.
constexpr int64_t kAhead = 512;

int64_t blocks(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

// A tile of W: in place, or where it is not whole, as a copy with zeros.
struct Source {
    const bf16* data;
    int64_t stride; // in bytes

    Source(const LinearWeight& weight, int64_t row, int64_t end, int64_t col, bf16 (&copy)[kTileElements]) {
        const int64_t rows = std::min(kSide, end - row), cols = std::min(kDepth, weight.cols - col);
        data = static_cast<const bf16*>(weight.data) + row * weight.row_stride + col;
        stride = weight.row_stride * int64_t(sizeof(bf16));
        if (rows == kSide && cols == kDepth)
            return;
        std::memset(copy, 0, sizeof copy);
        for (int64_t i = 0; i < rows; ++i)
            std::memcpy(copy + i * kDepth, data + i * weight.row_stride, cols * sizeof(bf16));
        data = copy;
        stride = kTileBytes;
    }

    void fetch_ahead() const {
        for (int64_t i = 0; i < kSide; ++i)
            __builtin_prefetch(reinterpret_cast<const char*>(data) + i * stride + kAhead);
    }
};

// Tile Index, the sums of 16 rows from row on and 16 rows of x from first on, into y.
template <int Index>
void finish(Tiles& tiles, const LinearWeight& weight, int64_t row, int64_t end, int64_t first, int64_t m, float* y,
            int64_t y_stride) {
    alignas(64) float sums[kSide][kSide];
    tiles.store<Index>(sums, kTileBytes);
    for (int64_t j = 0; j < std::min(kSide, m - first); ++j) {
        for (int64_t i = 0; i < std::min(kSide, end - row); ++i)
            y[(first + j) * y_stride + row + i] = sums[i][j] + (weight.bias == nullptr ? 0.0f : weight.bias[row + i]);
    }
}

// Up to two tiles of rows of W by up to two of x: sums in tiles 0 to 3, W in 4 and 5, x in 6 and 7.
template <int Down, int Across>
void square(Tiles& tiles, const LinearWeight& weight, int64_t row, int64_t end, const bf16* x, int64_t first, int64_t m,
            float* y, int64_t y_stride) {
    const int64_t depth = blocks(weight.cols, kDepth);
    tiles.zero<0>();
    if constexpr (Across == 2)
        tiles.zero<1>();
    if constexpr (Down == 2)
        tiles.zero<2>();
    if constexpr (Down == 2 && Across == 2)
        tiles.zero<3>();
    for (int64_t block = 0; block < depth; ++block) {
        bf16 copy[kTileElements];
        tiles.load<6>(x + block * kTileElements, kTileBytes);
        if constexpr (Across == 2)
            tiles.load<7>(x + (depth + block) * kTileElements, kTileBytes);
        const Source upper(weight, row, end, block * kDepth, copy);
        upper.fetch_ahead();
        tiles.load<4>(upper.data, upper.stride);
        tiles.multiply_bf16<0, 4, 6>();
        if constexpr (Across == 2)
            tiles.multiply_bf16<1, 4, 7>();
        if constexpr (Down == 2) {
            const Source lower(weight, row + kSide, end, block * kDepth, copy);
            lower.fetch_ahead();
            tiles.load<5>(lower.data, lower.stride);
            tiles.multiply_bf16<2, 5, 6>();
            if constexpr (Across == 2)
                tiles.multiply_bf16<3, 5, 7>();
        }
    }
    finish<0>(tiles, weight, row, end, first, m, y, y_stride);
    if constexpr (Across == 2)
        finish<1>(tiles, weight, row, end, first + kSide, m, y, y_stride);
    if constexpr (Down == 2)
        finish<2>(tiles, weight, row + kSide, end, first, m, y, y_stride);
    if constexpr (Down == 2 && Across == 2)
        finish<3>(tiles, weight, row + kSide, end, first + kSide, m, y, y_stride);
}

} // namespace

int64_t tiles_packed_bytes(int64_t cols, int64_t m) {
    return blocks(m, kSide) * blocks(cols, kDepth) * kTileElements * int64_t(sizeof(bf16));
}

void pack_tiles(const LinearWeight& weight, const float* x, int64_t x_stride, int64_t m, Range rows, void* packed) {
    const int64_t depth = blocks(weight.cols, kDepth);
    // The last row also brings the zeros that fill up its tiles.
    const int64_t end = rows.end == m && rows.begin < m ? blocks(m, kSide) * kSide : rows.end;
    for (int64_t row = rows.begin; row < end; ++row) {
        bf16* to = static_cast<bf16*>(packed) + row / kSide * depth * kTileElements + row % kSide * 2;
        for (int64_t col = 0; col < depth * kDepth; ++col) {
            const float value = row < m && col < weight.cols ? x[row * x_stride + col] : 0.0f;
            to[col / 2 * kDepth + col % 2].bits = to_bf16_bits(value);
        }
    }
}

void multiply_tiles(const LinearWeight& weight, Range rows, const void* packed, int64_t m, float* y, int64_t y_stride) {
    const int64_t block_elements = blocks(weight.cols, kDepth) * kTileElements; // of 16 rows of x
    const int64_t fit = kGroupBytes / (block_elements * int64_t(sizeof(bf16))) / 2 * 2;
    const int64_t group = std::max<int64_t>(2, fit) * kSide;
    Tiles tiles;
    for (int64_t begin = 0; begin < m; begin += group) {
        for (int64_t row = rows.begin; row < rows.end; row += 2 * kSide) {
            const bool two = rows.end - row > kSide;
            for (int64_t first = begin; first < std::min(begin + group, m); first += 2 * kSide) {
                const bf16* x = static_cast<const bf16*>(packed) + first / kSide * block_elements;
                const bool wide = m - first > kSide;
                const auto multiply = two ? (wide ? square<2, 2> : square<2, 1>) : (wide ? square<1, 2> : square<1, 1>);
                multiply(tiles, weight, row, rows.end, x, first, m, y, y_stride);
            }
        }
    }
}

#else

int64_t tiles_packed_bytes(int64_t, int64_t) {
    return 0;
}
void pack_tiles(const LinearWeight&, const float*, int64_t, int64_t, Range, void*) {}
void multiply_tiles(const LinearWeight&, Range, const void*, int64_t, float*, int64_t) {}

#endif

} // namespace fuseline
