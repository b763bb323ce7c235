// Sizes of the linear layers that their Python model reads too: only `constexpr int NAME = expression;`.
#pragma once

constexpr int LINEAR_WARPS = 8; // of a CTA
constexpr int LINEAR_THREADS = 32 * LINEAR_WARPS;
constexpr int UNIT_ROWS = 16; // of a packed weight: one MMA tile
constexpr int STEP_COLS = 16; // of one MMA
constexpr int STEP_BYTES = 2 * UNIT_ROWS * STEP_COLS;
constexpr int PIECE_COLS = 128; // of a unit, in one slot of a warp's ring
constexpr int PIECE_BYTES = 2 * UNIT_ROWS * PIECE_COLS;
constexpr int SLICE_COLS = 32; // what a CTA's columns are a multiple of
constexpr int CHUNK_COLS = 8;  // of x, which lie together for each token: a row of ldmatrix
constexpr int CHUNK_BYTES = 2 * CHUNK_COLS;
constexpr int MAX_BATCH = 64;
constexpr int REDUCE_TILES = 2; // column tiles of 8 tokens that are reduced together
constexpr int MAX_CLUSTER = 8;
constexpr int MAX_STAGES = 12;
constexpr int MAX_SHARED_BYTES = 232448; // of a CTA on Hopper

// What a CTA of the attention block leaves of a multiprocessor's: each block fills its rings beside the other's end.
constexpr int MLP_MAX_REGISTERS = 96;
constexpr int HEAD_MAX_REGISTERS = 128;
// Of instances for more than WIDE_TILES - 1 column tiles of tokens, which have a multiprocessor to themselves.
constexpr int WIDE_TILES = 4;
constexpr int WIDE_MAX_REGISTERS = 224;
// Of a CTA with rings of two stages, for up to 8 tokens: half of a multiprocessor's, so that the next block's CTA can
// start beside it. More tokens, or stages, may take MAX_SHARED_BYTES.
constexpr int MLP_MAX_SHARED_BYTES = 113 * 1024;
constexpr int HEAD_MAX_SHARED_BYTES = 113 * 1024;
