// The head: final RMSNorm, LM head, and of every token's logits the best `num_candidates`, or all, or both.
//
// The LM head is a linear layer like the others. A warp that owns a unit's sums writes them to the logits, if they are
// wanted, and for candidates to a part of the workspace of its own, from which its CTA picks the best later on. After
// a grid barrier one warp for each token merges what the CTAs found. None of this takes shared memory, so candidates
// are launched as logits are, and have their bits.
#include <cstdint>

#include "activations.cuh"
#include "api.h"
#include "candidates.cuh"
#include "launch.h"
#include "linear.cuh"

namespace fuseline {
namespace {

constexpr int64_t kWordBytes = 256;

// Of the busiest warp.
__host__ __device__ uint32_t units_of_warp(const fl_head_args& args) {
    return divide_up(divide_up(divide_up(args.vocab, UNIT_ROWS), args.launch.num_clusters), LINEAR_WARPS);
}

__host__ __device__ uint32_t exchanges_of_unit(const fl_head_args& args) {
    return divide_up(divide_up(args.batch, 8), REDUCE_TILES);
}

// Of a warp, in the workspace: the sums of the exchanges that it owned, as it held them.
__host__ __device__ int64_t kept_bytes(const fl_head_args& args) {
    const uint32_t owned = units_of_warp(args) * exchanges_of_unit(args) / args.launch.cluster + 1;
    return static_cast<int64_t>(owned) * min(divide_up(args.batch, 8), static_cast<uint32_t>(REDUCE_TILES)) * 512;
}

// Units of whose logits for one token a CTA owns at most, whatever the batch: from unit to unit of a warp its owner
// moves on by the exchanges of a unit. Where it comes back sooner than after all ranks, fewer warps ever own the token.
__host__ __device__ uint32_t max_listed(const fl_head_args& args) {
    return LINEAR_WARPS * divide_up(units_of_warp(args), args.launch.cluster);
}

// Their keys and rows, listed by a warp for one token at a time.
__host__ __device__ uint32_t list_bytes(const fl_head_args& args) {
    return max_listed(args) * (UNIT_ROWS + 1) * 4;
}

// Shared memory of a CTA, in order; the barriers are the ring's, then one each.
struct HeadLayout {
    uint32_t reduce, sums, x, ring, end;

    __host__ __device__ explicit HeadLayout(const fl_head_args& args) {
        const uint32_t cluster = args.launch.cluster, batch = args.batch;
        reduce = 1024;
        sums = reduce + LINEAR_WARPS * UnitReduce::slot_bytes(batch, cluster);
        x = sums + RowScales::bytes(cluster);
        ring = divide_up(x + x_slice_bytes(batch, args.hidden, cluster), 128) * 128;
        end = ring + LINEAR_WARPS * args.launch.stages * PIECE_BYTES;
    }
};

struct Workspace {
    uint32_t* word;
    unsigned char* kept;  // of CTA 0's warp 0
    uint2* found;         // [batch, CTAs, num_candidates]
    unsigned char* lists; // of CTA 0's warp 0

    __device__ explicit Workspace(const fl_head_args& args) {
        unsigned char* start = static_cast<unsigned char*>(args.workspace);
        word = reinterpret_cast<uint32_t*>(start);
        kept = start + kWordBytes;
        found = reinterpret_cast<uint2*>(kept + gridDim.x * LINEAR_WARPS * kept_bytes(args));
        lists = reinterpret_cast<unsigned char*>(found + gridDim.x * args.batch * args.num_candidates);
    }
    __device__ float4* kept_by(const fl_head_args& args, uint32_t warp) const {
        return reinterpret_cast<float4*>(kept + (blockIdx.x * LINEAR_WARPS + warp) * kept_bytes(args));
    }
    __device__ uint32_t* list_of(const fl_head_args& args, uint32_t warp) const {
        return reinterpret_cast<uint32_t*>(lists + (blockIdx.x * LINEAR_WARPS + warp) * list_bytes(args));
    }
};

// Lists the logits of `token` that this CTA owns; returns the number of entries.
template <int kTiles>
__device__ uint32_t list_logits(const fl_head_args& args, const Workspace& workspace, const UnitReduce& reduce,
                                const Units& units, uint32_t token, uint32_t* keys, uint32_t* rows) {
    constexpr uint32_t kGroup = UnitReduce::group<kTiles>();
    const uint32_t lane = threadIdx.x % 32, exchanges = UnitReduce::exchanges<kTiles>(args.batch);
    const uint32_t tile = token / 8, half = token % 2, column = token % 8 / 2, cluster = args.launch.cluster;
    const uint32_t end = units.first + units.total;
    uint32_t listed = 0;
    for (uint32_t warp = 0; warp < LINEAR_WARPS; ++warp) {
        const float4* kept = workspace.kept_by(args, warp);
        for (uint32_t unit = units.first + warp, e = tile / kGroup; unit < end; unit += LINEAR_WARPS, e += exchanges) {
            if (!reduce.owns(warp, e)) {
                continue;
            }
            if (lane < UNIT_ROWS / 2) {
                const float4 sums = kept[(e / cluster * kGroup + tile % kGroup) * 32 + 4 * lane + column];
                const uint32_t row = UNIT_ROWS * unit + lane, vocab = args.vocab;
                const float low = half == 0 ? sums.x : sums.y, high = half == 0 ? sums.z : sums.w;
                keys[UNIT_ROWS * listed + lane] = row < vocab ? sort_key(low) : 0;
                keys[UNIT_ROWS * listed + 8 + lane] = row + 8 < vocab ? sort_key(high) : 0;
                if (lane == 0) {
                    rows[listed] = UNIT_ROWS * unit;
                }
            }
            ++listed;
        }
    }
    __syncwarp();
    return UNIT_ROWS * listed;
}

template <int kTiles>
__global__ void __launch_bounds__(LINEAR_THREADS, kTiles < 4 ? 2 : 1) head(const __grid_constant__ fl_head_args args) {
    FL_DYNAMIC_SHARED(smem);
    const HeadLayout layout(args);
    const Workspace workspace(args);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, stages = args.launch.stages;
    const uint32_t cluster = args.launch.cluster, rank = cluster == 1 ? 0 : ptx::cluster_rank();
    const uint32_t batch = args.batch, vocab = args.vocab, index = blockIdx.x / cluster;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(smem);
    uint64_t* after_rings = barriers + LINEAR_WARPS * stages;

    Ring ring(smem + layout.ring + warp * stages * PIECE_BYTES, PIECE_BYTES, barriers + warp * stages, stages);
    UnitReduce reduce(smem + layout.reduce + warp * UnitReduce::slot_bytes(batch, cluster), after_rings + warp, cluster,
                      rank);
    const RowScales scales(smem + layout.sums, after_rings + LINEAR_WARPS, cluster, rank);
    if (lane == 0) {
        ring.init();
        reduce.init();
        if (warp == 0) {
            scales.init(batch);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();

    const Slice slice = slice_of(args.hidden, rank, cluster);
    const Units units =
        units_of(args.weight, divide_up(vocab, UNIT_ROWS), args.hidden, index, args.launch.num_clusters, slice);
    UnitSource source(units);
    ring.refill(source);

    ptx::cluster_wait();
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    load_normed(smem + layout.x,
                {args.residual, args.delta, args.norm, nullptr, static_cast<uint32_t>(args.hidden), args.rows}, batch,
                slice, scales, index, args.launch.num_clusters);
    __syncthreads();

    constexpr uint32_t kGroup = UnitReduce::group<kTiles>();
    const uint32_t exchanges = UnitReduce::exchanges<kTiles>(batch);
    float4* kept = workspace.kept_by(args, warp);
    const auto finish = [&](uint32_t unit, int n, const float (&c)[4]) {
        const uint32_t token = 8 * n + lane % 4 * 2, row = UNIT_ROWS * unit + lane / 4;
        scales.wait();
        float logits[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            logits[i] = token + i % 2 < batch ? c[i] * scales.scale(token + i % 2, args.hidden, args.eps) : 0.0f;
            if (args.logits != nullptr && token + i % 2 < batch && row + i / 2 * 8 < vocab) {
                args.logits[static_cast<uint64_t>(token + i % 2) * vocab + row + i / 2 * 8] = logits[i];
            }
        }
        if (args.num_candidates != 0) {
            const uint32_t e = (unit - units.first) / LINEAR_WARPS * exchanges + n / kGroup;
            kept[(e / cluster * kGroup + n % kGroup) * 32 + lane] =
                make_float4(logits[0], logits[1], logits[2], logits[3]);
        }
    };
    ResidentX x(smem + layout.x, slice);
    project<kTiles>(ring, source, units, x, batch, reduce, finish);
    scales.wait();
    if (args.num_candidates == 0) {
        return;
    }

    __syncthreads();
    uint32_t* keys = workspace.list_of(args, warp);
    uint32_t* rows = keys + UNIT_ROWS * max_listed(args);
    const uint32_t num_candidates = args.num_candidates;
    for (uint32_t token = warp; token < batch; token += LINEAR_WARPS) {
        const uint32_t entries = list_logits<kTiles>(args, workspace, reduce, units, token, keys, rows);
        Selection selection(keys, rows, entries);
        for (uint32_t i = 0; i < num_candidates; ++i) {
            const Candidate best = selection.take();
            if (lane == 0) {
                workspace.found[(token * gridDim.x + blockIdx.x) * num_candidates + i] =
                    make_uint2(best.key, best.not_row);
            }
        }
        __syncwarp();
    }
    grid_barrier(workspace.word);
    for (uint32_t token = blockIdx.x + gridDim.x * warp; token < batch; token += gridDim.x * LINEAR_WARPS) {
        Merge merge(workspace.found + token * gridDim.x * num_candidates, gridDim.x, num_candidates);
        for (uint32_t i = 0; i < num_candidates; ++i) {
            const Candidate best = merge.take();
            if (lane == 0) {
                args.candidate_logits[token * num_candidates + i] = best.logit();
                args.candidate_rows[token * num_candidates + i] = static_cast<int32_t>(best.row());
            }
        }
    }
}

using HeadKernel = void (*)(fl_head_args);

HeadKernel kernel_for(uint32_t batch) {
    return batch <= 8 ? head<1> : batch <= 16 ? head<2> : batch <= 32 ? head<4> : head<8>;
}

bool valid(const fl_head_args& args) {
    const fl_launch& launch = args.launch;
    return args.version == FL_CUDA_API && args.batch >= 1 && args.batch <= MAX_BATCH && launch.cluster >= 1 &&
           launch.cluster <= MAX_CLUSTER && (launch.cluster & (launch.cluster - 1)) == 0 && launch.num_clusters >= 1 &&
           launch.stages >= 1 && launch.stages <= MAX_STAGES && args.hidden % SLICE_COLS == 0 &&
           args.hidden >= SLICE_COLS * launch.cluster && args.num_candidates >= 0 &&
           args.num_candidates <= args.vocab && launch.cluster * launch.num_clusters <= Merge::kMaxLists;
}

LaunchShape shape_of(const fl_head_args& args) {
    return {static_cast<uint32_t>(args.launch.num_clusters),
            static_cast<uint32_t>(args.launch.cluster),
            LINEAR_THREADS,
            HeadLayout(args).end,
            args.launch.dependent != 0,
            args.stream};
}

} // namespace
} // namespace fuseline

using namespace fuseline;

int64_t fl_cuda_head_workspace(const fl_head_args* args) {
    if (args->num_candidates == 0) {
        return kWordBytes;
    }
    const int64_t ctas = static_cast<int64_t>(args->launch.cluster) * args->launch.num_clusters;
    const int64_t of_warp = kept_bytes(*args) + list_bytes(*args);
    return kWordBytes + ctas * (LINEAR_WARPS * of_warp + 8ll * args->batch * args->num_candidates);
}

int fl_cuda_head_limits(const fl_head_args* args, fl_limits* limits) {
    if (!valid(*args)) {
        return kInvalidValue;
    }
    const LaunchShape shape = shape_of(*args);
    limits->shared_bytes = static_cast<int32_t>(shape.shared_bytes);
    if (const int error = max_clusters(kernel_for(args->batch), shape, &limits->max_clusters)) {
        return error;
    }
    limits->max_clusters = min(limits->max_clusters, Merge::kMaxLists / args->launch.cluster);
    return 0;
}

int fl_cuda_head(const fl_head_args* args) {
    const bool possible = valid(*args) && HeadLayout(*args).end <= MAX_SHARED_BYTES;
    return possible ? launch("head", kernel_for(args->batch), *args, shape_of(*args)) : kInvalidValue;
}
