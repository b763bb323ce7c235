// The MLP block: RMSNorm of residual + delta, gate and up, SwiGLU, down. One kernel, each weight read once.
//
// Every CTA holds its slice of the normed tokens, streams its slice of its cluster's gate and up units, adds up within
// the cluster, and writes silu(gate) * up to global memory, where it stays in L2. One grid barrier; meanwhile the rings
// fill with units of the down projection. Then each CTA takes its slice of the activations, and so on as before.
// (Adding up down's partial sums over clusters instead, as ClusterFusion does, would put a grid-wide exchange at the
// kernel's end, where no stream hides it.)
#include <cstdint>

#include "activations.cuh"
#include "api.h"
#include "launch.h"
#include "linear.cuh"
#include "prefetch.cuh"

namespace fuseline {
namespace {

// Shared memory of a CTA, in order; the barriers are the ring's, then one each. The down half takes its x in parts if
// all of it is too much.
struct MlpLayout {
    uint32_t reduce, sums, x, x_room, ring, end;

    __host__ __device__ explicit MlpLayout(const fl_mlp_args& args) {
        const uint32_t cluster = args.launch.cluster, batch = args.batch;
        const uint32_t ring_bytes = LINEAR_WARPS * args.launch.stages * PIECE_BYTES;
        reduce = 1024;
        sums = reduce + LINEAR_WARPS * UnitReduce::slot_bytes(batch, cluster);
        x = sums + RowScales::bytes(cluster);
        x_room = StreamedX::room(batch, args.inner, cluster, x_slice_bytes(batch, args.hidden, cluster),
                                 room_left(args.launch, x + ring_bytes));
        ring = x + x_room;
        end = ring + ring_bytes;
    }
};

__device__ float silu(float x) {
    return __fdividef(x, 1.0f + __expf(-x));
}

__device__ float bias_of(const uint16_t* bias, uint32_t row) {
    return bias == nullptr ? 0.0f : ptx::bf16_to_float(bias[row]);
}

template <int kTiles>
__global__ void __maxnreg__(kTiles < WIDE_TILES ? MLP_MAX_REGISTERS : WIDE_MAX_REGISTERS)
    mlp_block(const __grid_constant__ fl_mlp_args args) {
    FL_DYNAMIC_SHARED(smem);
    const MlpLayout layout(args);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, stages = args.launch.stages;
    const uint32_t cluster = args.launch.cluster, rank = cluster == 1 ? 0 : ptx::cluster_rank();
    const uint32_t index = blockIdx.x / cluster, num_clusters = args.launch.num_clusters;
    const uint32_t batch = args.batch, hidden = args.hidden, inner = args.inner;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(smem);
    uint64_t* after_rings = barriers + LINEAR_WARPS * stages;
    uint16_t* activations = reinterpret_cast<uint16_t*>(static_cast<unsigned char*>(args.workspace) + 256);

    Ring ring(smem + layout.ring + warp * stages * PIECE_BYTES, PIECE_BYTES, barriers + warp * stages, stages);
    UnitReduce reduce(smem + layout.reduce + warp * UnitReduce::slot_bytes(batch, cluster), after_rings + warp, cluster,
                      rank);
    const RowScales scales(smem + layout.sums, after_rings + LINEAR_WARPS, cluster, rank);
    const Slice hidden_slice = slice_of(hidden, rank, cluster), inner_slice = slice_of(inner, rank, cluster);
    const uint64_t* x_barriers = after_rings + LINEAR_WARPS + 1;
    if (lane == 0) {
        ring.init();
        reduce.init();
        if (warp == 0) {
            scales.init(batch);
            StreamedX::init(x_barriers);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();

    const Units gate_up = units_of(args.gate_up, 2 * inner / UNIT_ROWS, hidden, index, num_clusters, hidden_slice);
    const Units down = units_of(args.down, hidden / UNIT_ROWS, inner, index, num_clusters, inner_slice);
    Chained<UnitSource, Chained<UnitSource, PrefetchSource>> source{
        UnitSource(gate_up), {UnitSource(down), {args.prefetch, args.prefetch_bytes}}};
    ring.refill(source);

    ptx::cluster_wait();
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    load_normed(smem + layout.x, {args.residual, args.delta, args.norm, args.residual_out, hidden}, batch, hidden_slice,
                scales, index, num_clusters);
    __syncthreads();

    const uint32_t row = lane / 4, column = lane % 4 * 2;
    const auto activate = [&](uint32_t unit, int n, const float (&c)[4]) {
        const uint32_t neuron = 8 * unit + row;
        const float gate_bias = bias_of(args.gate_up_bias, neuron),
                    up_bias = bias_of(args.gate_up_bias, inner + neuron);
        scales.wait();
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t token = 8 * n + column + i;
            if (token < batch) {
                const float scale = scales.scale(token, hidden, args.eps);
                const float gate = c[i] * scale + gate_bias, up = c[2 + i] * scale + up_bias;
                activations[x_index(batch, token, neuron)] = ptx::float_to_bf16(silu(gate) * up);
            }
        }
    };
    const auto store = [&](uint32_t unit, int n, const float (&c)[4]) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t token = 8 * n + column + i % 2, out = UNIT_ROWS * unit + row + i / 2 * 8;
            if (token < batch) {
                args.delta_out[static_cast<uint64_t>(token) * hidden + out] = c[i] + bias_of(args.down_bias, out);
            }
        }
    };
    // One loop for both halves: half the code, which has to come into the instruction caches too.
    Units units = gate_up;
    StreamedX x(smem + layout.x, hidden_slice);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        project<kTiles>(ring, source, units, x, batch, reduce, [&](uint32_t unit, int n, const float (&c)[4]) {
            if (half == 0) {
                activate(unit, n, c);
            } else {
                store(unit, n, c);
            }
        });
        if (half == 0) {
            scales.wait();
            ptx::fence_proxy_async_global();
            grid_barrier(static_cast<uint32_t*>(args.workspace));
            units = down;
            x = StreamedX(smem + layout.x, layout.x_room, x_barriers, activations, batch, inner_slice);
            x.start(units.rounds());
        }
    }
}

using Kernel = void (*)(fl_mlp_args);

Kernel kernel_for(uint32_t batch) {
    return batch <= 8 ? mlp_block<1> : batch <= 16 ? mlp_block<2> : batch <= 32 ? mlp_block<4> : mlp_block<8>;
}

bool valid(const fl_mlp_args& args) {
    const fl_launch& launch = args.launch;
    return args.version == FL_CUDA_API && args.batch >= 1 && args.batch <= MAX_BATCH && launch.cluster >= 1 &&
           launch.cluster <= MAX_CLUSTER && (launch.cluster & (launch.cluster - 1)) == 0 && launch.num_clusters >= 1 &&
           launch.stages >= 1 && launch.stages <= MAX_STAGES && args.hidden % SLICE_COLS == 0 &&
           args.inner % SLICE_COLS == 0 && args.hidden >= SLICE_COLS * launch.cluster &&
           args.inner >= SLICE_COLS * launch.cluster;
}

LaunchShape shape_of(const fl_mlp_args& args) {
    return {static_cast<uint32_t>(args.launch.num_clusters),
            static_cast<uint32_t>(args.launch.cluster),
            LINEAR_THREADS,
            MlpLayout(args).end,
            args.launch.dependent != 0,
            args.stream};
}

} // namespace
} // namespace fuseline

using namespace fuseline;

int64_t fl_cuda_mlp_workspace(const fl_mlp_args* args) {
    return 256 + static_cast<int64_t>(x_bytes(args->batch, args->inner));
}

int fl_cuda_mlp_limits(const fl_mlp_args* args, fl_limits* limits) {
    if (!valid(*args)) {
        return kInvalidValue;
    }
    const LaunchShape shape = shape_of(*args);
    limits->shared_bytes = static_cast<int32_t>(shape.shared_bytes);
    return max_clusters(kernel_for(args->batch), shape, &limits->max_clusters);
}

int fl_cuda_mlp_block(const fl_mlp_args* args) {
    const bool possible = valid(*args) && MlpLayout(*args).end <= MAX_SHARED_BYTES;
    return possible ? launch("mlp_block", kernel_for(args->batch), *args, shape_of(*args)) : kInvalidValue;
}
