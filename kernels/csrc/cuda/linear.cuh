// A linear layer y = x W^T for few tokens, spread over clusters: the part of a kernel that streams weights.
//
//   rows of W     clusters x units      A cluster owns whole units (16 rows); warp w of each of its CTAs takes the
//                                       w-th, w+8-th… of them.
//   columns of W  CTAs of the cluster   Each CTA takes a slice of the columns of every unit, and only that slice of x.
//   tokens        columns of an MMA     Weights are read once for all of them.
//
// A warp streams its units' slices through its own ring (ring.cuh), multiplies piece by piece, and then the warps of
// the same number in all CTAs of the cluster add their partial sums: each sends its own to one of them, the owner,
// which adds in rank order and goes on with the whole sums. Owners rotate.
//
// The order of every sum depends on the layer's shape and the cluster size only, so a token's result is the same in any
// batch and on any number of clusters.
//
// x is bf16 in chunks of 8 columns: those of token 0, of token 1…, then the next 8 columns of all tokens (x_index), in
// shared memory and wherever one layer leaves it for another in global memory. So any columns of all tokens are one
// stretch for a bulk copy, and the rows that ldmatrix takes lie side by side.
#pragma once

#include <cstdint>

#include "api.h"
#include "linear_tiles.h"
#include "ptx.cuh"
#include "ring.cuh"

namespace fuseline {

__host__ __device__ constexpr uint32_t divide_up(uint32_t a, uint32_t b) {
    return (a + b - 1) / b;
}

// Columns [begin, end) of a matrix, multiples of SLICE_COLS.
struct Slice {
    uint32_t begin, end;

    __host__ __device__ uint32_t cols() const { return end - begin; }
};

// The slice of CTA `rank`; slices differ by at most SLICE_COLS.
__host__ __device__ inline Slice slice_of(uint32_t cols, uint32_t rank, uint32_t cluster) {
    const uint32_t groups = cols / SLICE_COLS;
    return {groups * rank / cluster * SLICE_COLS, groups * (rank + 1) / cluster * SLICE_COLS};
}

// From a chunk of x to the next, in tokens; odd, so that stores of consecutive chunks spread over the banks.
__host__ __device__ constexpr uint32_t x_pitch(uint32_t batch) {
    return batch | 1;
}

// Where an element of x is.
__host__ __device__ constexpr uint32_t x_index(uint32_t batch, uint32_t token, uint32_t col) {
    return (col / CHUNK_COLS * x_pitch(batch) + token) * CHUNK_COLS + col % CHUNK_COLS;
}

// Bytes of x; `cols` is a multiple of CHUNK_COLS.
__host__ __device__ constexpr uint32_t x_bytes(uint32_t batch, uint32_t cols) {
    return cols / CHUNK_COLS * x_pitch(batch) * CHUNK_BYTES;
}

// Bytes of the widest slice of x.
__host__ __device__ constexpr uint32_t x_slice_bytes(uint32_t batch, uint32_t cols, uint32_t cluster) {
    return x_bytes(batch, divide_up(cols / SLICE_COLS, cluster) * SLICE_COLS);
}

// Shared memory that a launch leaves a kernel which has used so much.
__host__ __device__ inline uint32_t room_left(const fl_launch& launch, uint32_t used) {
    const uint32_t limit = launch.max_shared_bytes == 0 ? MAX_SHARED_BYTES : launch.max_shared_bytes;
    return limit > used ? (limit - used) / 128 * 128 : 0;
}

// ---- weights -------------------------------------------------------------------------------------------------------

// Units of one matrix that the warps of a CTA take in turn.
struct Units {
    const uint16_t* packed;
    uint32_t cols;  // of the matrix
    Slice slice;    // of this CTA
    uint32_t first; // unit, of the cluster
    uint32_t total; // of all warps

    // Of this warp: how many, and which.
    __device__ uint32_t count() const {
        const uint32_t warp = threadIdx.x / 32;
        return total > warp ? divide_up(total - warp, LINEAR_WARPS) : 0;
    }
    __device__ uint32_t unit(uint32_t i) const { return first + threadIdx.x / 32 + i * LINEAR_WARPS; }
    // Of the busiest warp.
    __device__ uint32_t rounds() const { return divide_up(total, LINEAR_WARPS); }
};

// The units of a cluster out of `total`, which the clusters share evenly.
__device__ inline Units units_of(const uint16_t* packed, uint32_t total, uint32_t cols, uint32_t cluster_index,
                                 uint32_t num_clusters, Slice slice) {
    const uint32_t begin = total * cluster_index / num_clusters;
    const uint32_t end = total * (cluster_index + 1) / num_clusters;
    return {packed, cols, slice, begin, end - begin};
}

// A source of pieces for a ring: PIECE_COLS columns of a unit each, the last of a slice perhaps fewer.
class UnitSource {
  public:
    __device__ explicit UnitSource(const Units& units)
        : next_(reinterpret_cast<const unsigned char*>(units.packed) +
                static_cast<uint64_t>(units.unit(0)) * units.cols * (2 * UNIT_ROWS) +
                units.slice.begin * (2 * UNIT_ROWS)),
          unit_bytes_(units.slice.cols() * (2 * UNIT_ROWS)), left_(units.count() == 0 ? 0 : unit_bytes_),
          units_left_(units.count()),
          skip_(static_cast<uint64_t>(units.cols) * (2 * UNIT_ROWS * LINEAR_WARPS) - unit_bytes_) {}

    __device__ bool issue(Ring& ring) {
        if (left_ == 0) {
            return false;
        }
        const uint32_t bytes = left_ < PIECE_BYTES ? left_ : PIECE_BYTES;
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive_expect_tx(ring.next_barrier(), bytes);
            ptx::bulk_load_hint(ring.next_slot(), next_, bytes, ring.next_barrier(), ptx::evict_first_policy());
        }
        ring.issued();
        next_ += bytes;
        left_ -= bytes;
        if (left_ == 0 && --units_left_ != 0) {
            next_ += skip_;
            left_ = unit_bytes_;
        }
        return true;
    }

  private:
    const unsigned char* next_;
    uint32_t unit_bytes_, left_, units_left_;
    uint64_t skip_; // from the end of a unit's slice to the start of the next unit's
};

// First everything of one source, then of another.
template <class First, class Second>
struct Chained {
    First first;
    Second second;

    __device__ bool issue(Ring& ring) { return first.issue(ring) || second.issue(ring); }
};

// ---- x -------------------------------------------------------------------------------------------------------------

// Where this lane finds the rows of x that ldmatrix wants of it. Tokens behind the last repeat it: their sums are
// columns that nobody looks at.
template <int kTiles>
struct XRows {
    uint32_t address[kTiles], chunk_bytes;

    __device__ XRows(const unsigned char* x, uint32_t num_tokens) {
        const uint32_t batch = ptx::recomputed(num_tokens), lane = threadIdx.x % 32;
        chunk_bytes = x_pitch(batch) * CHUNK_BYTES;
        const uint32_t base = ptx::shared_address(x) + lane / 8 * chunk_bytes;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            address[n] = base + min(8 * n + lane % 8, batch - 1) * CHUNK_BYTES;
        }
    }
};

// All of the slice, in shared memory for good.
class ResidentX {
  public:
    __device__ ResidentX(const unsigned char* x, Slice slice) : x_(x), cols_(slice.cols()) {}

    __device__ uint32_t part_cols() const { return cols_; }
    __device__ const unsigned char* acquire() const { return x_; }
    __device__ void release() const {}

  private:
    const unsigned char* x_;
    uint32_t cols_;
};

// ---- multiplying ---------------------------------------------------------------------------------------------------

// c[n] += the piece times x from column `col` of what x holds on; `steps` is even.
template <int kTiles>
__device__ inline void multiply(const unsigned char* piece, const XRows<kTiles>& x, uint32_t col, uint32_t steps,
                                float (&c)[kTiles][4]) {
    const uint4* fragments = reinterpret_cast<const uint4*>(piece) + threadIdx.x % 32;
    uint32_t chunk = col / CHUNK_COLS * x.chunk_bytes;
#pragma unroll 4
    for (uint32_t step = 0; step < steps; step += 2) {
        const uint4 even = fragments[32 * step], odd = fragments[32 * step + 32];
        const uint32_t a0[4] = {even.x, even.y, even.z, even.w}, a1[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, x.address[n] + chunk);
            ptx::mma_bf16(c[n], a0, {b[0], b[1]});
            ptx::mma_bf16(c[n], a1, {b[2], b[3]});
        }
        chunk += 2 * STEP_COLS / CHUNK_COLS * x.chunk_bytes;
    }
}

// ---- adding up over the cluster ------------------------------------------------------------------------------------

// A warp's part of the reduction of its units' partial sums, between the warps of its number in all CTAs.
//
// In exchange e, rank (warp + e) % cluster is the owner: the others send it their accumulators by st.async, each into
// its own slot. One set of slots is enough: between two exchanges that a rank owns, `cluster` apart, every other rank
// has owned one and has then waited for what the first sent after it had read its slots.
class UnitReduce {
  public:
    // `slots`: slot_bytes; `barrier`: one mbarrier.
    __device__ UnitReduce(unsigned char* slots, uint64_t* barrier, uint32_t cluster, uint32_t rank)
        : slots_(slots), barrier_(ptx::shared_address(barrier)), cluster_(cluster), rank_(rank),
          owner_(threadIdx.x / 32 % cluster) {}

    // Of a warp's slots; all CTAs have them at the same place.
    __host__ __device__ static uint32_t slot_bytes(uint32_t batch, uint32_t cluster) {
        const uint32_t tiles = batch <= 8 ? 1 : REDUCE_TILES;
        return (cluster - 1) * tiles * 512;
    }

    // Exchanges of a unit.
    template <int kTiles>
    __device__ static uint32_t exchanges(uint32_t batch) {
        return divide_up(divide_up(batch, 8), group<kTiles>());
    }
    // Column tiles of an exchange.
    template <int kTiles>
    __device__ static constexpr uint32_t group() {
        return kTiles < REDUCE_TILES ? kTiles : REDUCE_TILES;
    }
    // Whether this rank owns exchange e of warp `warp`.
    __device__ bool owns(uint32_t warp, uint32_t e) const { return (warp + e) % cluster_ == rank_; }

    // One lane; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const { ptx::mbarrier_init(barrier_, 1); }

    // All warps of this number call it with their partial sums c[n] of tokens 8n… of the same unit; the owner of tile n
    // goes on to epilogue(n, sums).
    template <int kTiles, class Epilogue>
    __device__ void reduce(float (&c)[kTiles][4], uint32_t batch, const Epilogue& epilogue) {
        constexpr int kGroup = group<kTiles>();
#pragma unroll
        for (int n = 0; n < kTiles; n += kGroup) {
            if (8 * n >= static_cast<int>(batch)) {
                break;
            }
            if (rank_ != owner_) {
                send<kTiles, kGroup>(c, n, batch);
            } else {
                if (cluster_ > 1) {
                    receive<kTiles, kGroup>(c, n, batch);
                }
#pragma unroll
                for (int i = n; i < n + kGroup; ++i) {
                    epilogue(i, c[i]);
                }
            }
            owner_ = owner_ + 1 == cluster_ ? 0 : owner_ + 1;
        }
    }

  private:
    // A lane whose two tokens of tile n are behind the last keeps its sums to itself.
    __device__ static bool has_token(int n, uint32_t batch) { return 8 * n + threadIdx.x % 4 * 2 < batch; }

    __device__ static uint32_t tile_bytes(int n, uint32_t batch) {
        const int tokens = static_cast<int>(batch) - 8 * n;
        return tokens <= 0 ? 0 : 128 * min(4, (tokens + 1) / 2); // 8 lanes of 16 bytes for every two tokens
    }

    template <int kTiles, int kGroup>
    __device__ void send(const float (&c)[kTiles][4], int n, uint32_t batch) const {
        const uint32_t slot = rank_ < owner_ ? rank_ : rank_ - 1, lane = threadIdx.x % 32;
        const uint32_t to = ptx::map_to_rank(ptx::shared_address(slots_) + 16 * (32 * kGroup * slot + lane), owner_);
        const uint32_t barrier = ptx::map_to_rank(barrier_, owner_);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (has_token(n + i, batch)) {
                const float (&v)[4] = c[n + i];
                ptx::st_async(to + 512 * i, make_float4(v[0], v[1], v[2], v[3]), barrier);
            }
        }
    }

    template <int kTiles, int kGroup>
    __device__ void receive(float (&c)[kTiles][4], int n, uint32_t batch) {
        if (threadIdx.x % 32 == 0) {
            uint32_t bytes = 0;
            for (int i = 0; i < kGroup; ++i) {
                bytes += tile_bytes(n + i, batch);
            }
            ptx::mbarrier_arrive_expect_tx(barrier_, bytes * (cluster_ - 1));
        }
        ptx::mbarrier_wait(barrier_, parity_);
        parity_ ^= 1;
        const float4* slots = reinterpret_cast<const float4*>(slots_) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (!has_token(n + i, batch)) {
                continue;
            }
            float (&own)[4] = c[n + i];
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (uint32_t rank = 0; rank < cluster_; ++rank) {
                const uint32_t slot = rank < owner_ ? rank : rank - 1;
                const float4 part =
                    rank == owner_ ? make_float4(own[0], own[1], own[2], own[3]) : slots[32 * (kGroup * slot + i)];
                sum.x += part.x;
                sum.y += part.y;
                sum.z += part.z;
                sum.w += part.w;
            }
            own[0] = sum.x;
            own[1] = sum.y;
            own[2] = sum.z;
            own[3] = sum.w;
        }
        __syncwarp(); // what any lane sends from here on says that all of them have read
    }

    unsigned char* slots_;
    uint32_t barrier_, cluster_, rank_, owner_, parity_ = 0;
};

// ---- the layer -----------------------------------------------------------------------------------------------------

// All units of this warp. epilogue(unit, n, c) runs in the owner of tile n, once per unit, on all lanes: with
// g = lane / 4 and t = lane % 4, c[0] and c[1] are row g of the unit for tokens 8n + 2t and the next, c[2] and c[3] row
// g + 8. Tokens may be behind the last of the batch. `source` goes on refilling the ring behind these units. All warps
// of the CTA call it. X says how much of the slice is in shared memory at a time: acquire() waits for the next part of
// part_cols() columns (the last may be less) and says where it is, release() gives it up; after the last, the first
// comes again.
template <int kTiles, class Source, class X, class Epilogue>
__device__ inline void project(Ring& ring, Source& source, const Units& units, X& x, uint32_t batch, UnitReduce& reduce,
                               const Epilogue& epilogue) {
    const uint32_t count = units.count(), part_cols = x.part_cols();
    for (uint32_t i = 0; i < units.rounds(); ++i) {
        float c[kTiles][4] = {};
        for (uint32_t begin = 0; begin < units.slice.cols(); begin += part_cols) {
            const XRows<kTiles> rows(x.acquire(), batch);
            const uint32_t part = i < count ? min(units.slice.cols() - begin, part_cols) : 0;
            for (uint32_t col = 0; col < part; col += PIECE_COLS) {
                const uint32_t cols = min(part - col, static_cast<uint32_t>(PIECE_COLS));
                multiply<kTiles>(ring.wait(), rows, col, cols / STEP_COLS, c);
                ring.release();
                ring.refill(source);
            }
            x.release();
        }
        if (i < count) {
            const uint32_t unit = units.unit(i);
            reduce.reduce(c, batch, [&](int n, const float (&sums)[4]) { epilogue(unit, n, sums); });
        }
    }
}

} // namespace fuseline
