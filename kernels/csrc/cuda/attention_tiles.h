// Sizes of the attention block that its Python model reads too: only `constexpr int NAME = expression;`.
#pragma once

// ---- KV tiles: what one warp takes from the cache at a time, keys then values
constexpr int ATTN_TILE_BYTES = 4096;                           // of keys, and as many of values
constexpr int ATTN_CHUNKS = 4;                                  // bulk copies of a tile
constexpr int ATTN_CHUNK_BYTES = ATTN_TILE_BYTES / ATTN_CHUNKS; // within one KV block
constexpr int ATTN_CHUNK_PITCH = ATTN_CHUNK_BYTES + 32;         // in shared memory: loads without bank conflicts
constexpr int ATTN_SLOT_BYTES = ATTN_CHUNKS * ATTN_CHUNK_PITCH; // of a warp's ring

// ---- How a sequence is cut; results depend on these and on the cluster size
constexpr int ATTN_NODE_TOKENS = 1024; // doubled until a sequence has at most MAX_NODES
constexpr int ATTN_MAX_NODES = 16;     // and one more where a window starts inside a node

// ---- Limits
constexpr int ATTN_WARPS = 8; // of a CTA
constexpr int ATTN_THREADS = 32 * ATTN_WARPS;
constexpr int ATTN_MAX_BATCH = 64;
constexpr int ATTN_GROUP_HEADS = 8;     // query heads of a KV head that are one work item
constexpr int ATTN_MAX_REGISTERS = 160; // but for WIDE_TILES (linear_tiles.h) and more
// As MLP_MAX_SHARED_BYTES, but more than half where a KV head has four query heads or more: alone on a multiprocessor.
constexpr int ATTN_MAX_SHARED_BYTES = 115 * 1024;
