// The two products of attention for a tile of queries: scores = queries x keys, and out += weights x values, both over
// a run of keys that lie one after the other in memory. Register blocks of kRows queries; the shape of a block changes
// nothing in how one element is computed.
#pragma once

#include "vmath.h"

namespace fuseline {

constexpr int kRows = 3;

// Keys or values of one run: n rows of T, each of `vectors` whole vectors, `stride` elements apart. While it is
// computed with, as much from `next` on is fetched, where that is not null: hardware does not look beyond a page.
template <class T>
struct Run {
    const T* data;
    int64_t stride;
    int64_t n;
    int64_t vectors;
    const T* next;
};

template <class T>
constexpr int64_t kLine = 64 / sizeof(T); // elements of a cache line

// Rows of floats, some apart.
struct Rows {
    float* data;
    int64_t stride;
    float* operator[](int64_t row) const { return data + row * stride; }
};

template <class T, int R, int C>
inline __attribute__((always_inline)) void dot_products(const Run<T>& keys, int64_t first, const Rows& queries,
                                                        f32v (&sums)[R][C]) {
    const T* key = keys.data + first * keys.stride;
    const T* next = keys.next == nullptr ? nullptr : keys.next + first * keys.stride;
    const float* query = queries.data;
    for (int64_t at = 0; at < keys.vectors * kLanes; at += kLanes) {
        if (next != nullptr) {
#pragma GCC unroll 8
            for (int64_t ahead = 0; ahead < C * kLanes; ahead += kLine<T>)
                __builtin_prefetch(next + C * at + ahead);
        }
        f32v wide[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            wide[r] = load(query + r * queries.stride + at);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const f32v k = load(key + c * keys.stride + at);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sums[r][c] = fma(wide[r], k, sums[r][c]);
        }
    }
}

template <class T, int R>
void score_block(const Run<T>& keys, const Rows& queries, const Rows& scores) {
    int64_t key = 0;
    for (; key + 4 <= keys.n; key += 4) {
        f32v sums[R][4] = {};
        dot_products(keys, key, queries, sums);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            hsum4(sums[r], scores[r] + key);
    }
    for (; key < keys.n; ++key) {
        f32v sums[R][1] = {};
        dot_products(keys, key, queries, sums);
        for (int r = 0; r < R; ++r)
            scores[r][key] = hsum(sums[r][0]);
    }
}

template <class T, int R, int V>
inline __attribute__((always_inline)) void weigh_vectors(const Run<T>& values, int64_t at, const Rows& weights,
                                                         const Rows& out) {
    f32v sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
            sums[r][v] = load(out[r] + at + v * kLanes);
    const T* value = values.data + at;
    for (int64_t key = 0; key < values.n; ++key, value += values.stride) {
        if (values.next != nullptr) {
#pragma GCC unroll 8
            for (int64_t ahead = 0; ahead < V * kLanes; ahead += kLine<T>)
                __builtin_prefetch(values.next + key * values.stride + at + ahead);
        }
        f32v weight[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            weight[r] = splat(weights[r][key]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const f32v wide = load(value + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                sums[r][v] = fma(weight[r], wide, sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
            store(out[r] + at + v * kLanes, sums[r][v]);
}

template <class T, int R>
void weigh_block(const Run<T>& values, const Rows& weights, const Rows& out) {
    constexpr int kWide = R == 1 ? 8 : 4; // as many sums as registers hold
    int64_t vector = 0;
    for (; vector + kWide <= values.vectors; vector += kWide)
        weigh_vectors<T, R, kWide>(values, vector * kLanes, weights, out);
    for (; vector < values.vectors; ++vector)
        weigh_vectors<T, R, 1>(values, vector * kLanes, weights, out);
}

// Calls block<R>(first row) for rows [begin, end) in blocks of kRows, the last ones of 2, or of 1 for a single row.
template <class Block>
inline void for_row_blocks(int64_t begin, int64_t end, const Block& block) {
    int64_t row = begin;
    for (; end - row == kRows || end - row > 4; row += kRows)
        block(std::integral_constant<int, kRows>(), row);
    for (; end - row >= 2; row += 2)
        block(std::integral_constant<int, 2>(), row);
    if (row < end)
        block(std::integral_constant<int, 1>(), row);
}

// scores[r][0, n) of rows [begin, end) = queries[r] . keys.
template <class T>
void score(const Run<T>& keys, const Rows& queries, const Rows& scores, int64_t begin, int64_t end) {
    for_row_blocks(begin, end, [&](auto rows, int64_t r) {
        score_block<T, decltype(rows)::value>(keys, {queries[r], queries.stride}, {scores[r], scores.stride});
    });
}

// out[r] of rows [begin, end) += weights[r][0, n) x values, one key after the other.
template <class T>
void weigh(const Run<T>& values, const Rows& weights, const Rows& out, int64_t begin, int64_t end) {
    for_row_blocks(begin, end, [&](auto rows, int64_t r) {
        weigh_block<T, decltype(rows)::value>(values, {weights[r], weights.stride}, {out[r], out.stride});
    });
}

} // namespace fuseline
