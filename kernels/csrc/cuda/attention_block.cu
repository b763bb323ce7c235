// The attention block: RMSNorm of residual + delta, QKV, head norms, rotary embedding, KV append, paged attention,
// output projection. One kernel; weights are read once for the whole batch, and a row's KV once.
//
// Three streams follow one another through every warp's ring without a gap: units of QKV, KV tiles, units of the output
// projection. Queries meet keys after a grid barrier, and so do attended heads and the output projection; while a warp
// waits there its ring fills with what it needs next, none of which depends on what it waits for.
//
//   QKV     a cluster takes units, its CTAs slices of their columns; sums are exchanged on chip (linear.cuh, qkv.cuh)
//   KV      a cluster takes nodes of sequences, its warps tiles; states are folded on chip (kv_*.cuh)
//   output  as QKV, from the attended heads of all clusters
//
// Partial sums of the output projection per KV head would need no second barrier, but an exchange of num_kv_heads times
// batch * hidden floats at the kernel's end, where no stream hides it, or atomics.
#include "activations.cuh"
#include "api.h"
#include "launch.h"
#include "paged_attention.cuh"
#include "prefetch.cuh"
#include "qkv.cuh"

namespace fuseline {
namespace {

// Query heads of a KV head are cut into equal parts of at most ATTN_GROUP_HEADS; a group is a part of a KV head's.
struct HeadGroups {
    int32_t per_kv, parts, per_part, count;

    __host__ __device__ explicit HeadGroups(const fl_attention_args& args) {
        per_kv = args.num_heads / args.num_kv_heads;
        parts = (per_kv + ATTN_GROUP_HEADS - 1) / ATTN_GROUP_HEADS;
        per_part = (per_kv + parts - 1) / parts;
        count = args.num_kv_heads * parts;
    }
};

__host__ __device__ CombineShape combine_shape(const fl_attention_args& args) {
    return CombineShape::of(args.head_dim, HeadGroups(args).per_part, args.launch.cluster);
}

struct Barriers {
    uint64_t reduce[2][LINEAR_WARPS], scales, x[StreamedX::kBarriers], combine[2], rings[LINEAR_WARPS * MAX_STAGES];
};

// Shared memory of a CTA, in order, behind its barriers. x of QKV, the slots that fold softmax states, and x of the
// output projection, in parts if all of it is too much, follow one another in `phase`.
struct AttentionLayout {
    uint32_t reduce, sums, units, plan, phase, phase_room, ring, end;

    __host__ __device__ explicit AttentionLayout(const fl_attention_args& args) {
        const uint32_t cluster = args.launch.cluster, batch = args.batch;
        const uint32_t ring_bytes = LINEAR_WARPS * args.launch.stages * ATTN_SLOT_BYTES;
        reduce = divide_up(sizeof(Barriers), 128) * 128;
        sums = reduce + LINEAR_WARPS * UnitReduce::slot_bytes(batch, cluster);
        units = sums + RowScales::bytes(cluster);
        plan = units + LINEAR_WARPS * sizeof(Units);
        phase = divide_up(plan + sizeof(KvPlan), 128) * 128;
        const uint32_t least =
            max(x_slice_bytes(batch, args.hidden, cluster), static_cast<uint32_t>(combine_shape(args).bytes()));
        phase_room = StreamedX::room(batch, args.num_heads * args.head_dim, cluster, least,
                                     room_left(args.launch, phase + ring_bytes));
        ring = phase + phase_room;
        end = ring + ring_bytes;
    }
};

// Global memory between the phases. What must be zero at first comes first, where it does not depend on the batch.
struct AttentionWorkspace {
    static constexpr int64_t kBarrierBytes = 256;
    int64_t squares, keys, values, queries, attended, partials, end;

    __host__ __device__ explicit AttentionWorkspace(const fl_attention_args& args) {
        const int64_t batch = args.batch, dim = args.head_dim, groups = HeadGroups(args).count;
        const CombineShape shape = combine_shape(args);
        const int32_t longest = args.table_width * args.block_size;
        const int64_t nodes = min(longest / ATTN_NODE_TOKENS + 2, ATTN_MAX_NODES + 1);
        squares = kBarrierBytes + ATTN_MAX_BATCH * groups * MAX_CLUSTER * 4;
        keys = squares + batch * (args.num_heads + args.num_kv_heads) * (dim / 16) * 4;
        values = keys + batch * args.num_kv_heads * dim * 4;
        queries = values + batch * args.num_kv_heads * dim * 4;
        attended = queries + batch * args.num_heads * dim * 2;
        partials = attended + x_bytes(args.batch, args.num_heads * args.head_dim);
        end = partials + batch * nodes * groups * shape.cluster * shape.part_vectors() * 16;
    }
};

// What the kernel is given: all that does not depend on the CTA is in constant memory.
struct AttentionParams {
    fl_attention_args args;
    AttentionLayout layout;
    KvWork work;
    KvCache cache;
    ProjectedRows projected;
    AttendedRows rows;
    CombineShape shape;
    uint32_t* barrier;

    explicit AttentionParams(const fl_attention_args& a) : args(a), layout(a), shape(combine_shape(a)) {
        const HeadGroups groups(a);
        const AttentionWorkspace offsets(a);
        auto* workspace = static_cast<unsigned char*>(a.workspace);
        const auto at = [=](int64_t offset) { return reinterpret_cast<float*>(workspace + offset); };
        const auto bits = [](int32_t power) { return __builtin_ctz(static_cast<uint32_t>(power)); };
        work = {a.window,     groups.count,     a.launch.num_clusters,
                groups.parts, shape.num_states, bits(ATTN_TILE_BYTES / 2 / a.head_dim)};
        cache = {a.kv,           a.num_blocks * a.num_kv_heads * a.block_size * a.head_dim,
                 a.block_tables, a.table_width,
                 a.num_kv_heads, bits(a.block_size)};
        projected = {reinterpret_cast<uint16_t*>(at(offsets.queries)),
                     at(offsets.keys),
                     at(offsets.values),
                     a.q_norm == nullptr ? nullptr : at(offsets.squares),
                     a.num_heads,
                     a.num_kv_heads,
                     a.scale,
                     a.eps};
        rows = {reinterpret_cast<uint16_t*>(at(offsets.attended)),
                reinterpret_cast<float4*>(at(offsets.partials)),
                reinterpret_cast<uint32_t*>(at(AttentionWorkspace::kBarrierBytes)),
                a.num_heads,
                groups.per_kv,
                groups.per_part,
                groups.parts,
                groups.count,
                a.batch};
        barrier = static_cast<uint32_t*>(a.workspace);
    }
};

template <int D, int kTiles>
__global__ void __maxnreg__(kTiles < WIDE_TILES ? ATTN_MAX_REGISTERS : WIDE_MAX_REGISTERS)
    attention_block(const __grid_constant__ AttentionParams params) {
    FL_DYNAMIC_SHARED(smem);
    const fl_attention_args& args = params.args;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, stages = args.launch.stages;
    const uint32_t cluster = args.launch.cluster, rank = ptx::cluster_rank();
    const uint32_t index = blockIdx.x / cluster, num_clusters = args.launch.num_clusters;
    const uint32_t batch = args.batch, hidden = args.hidden, attended_cols = args.num_heads * D;
    Barriers& barriers = *reinterpret_cast<Barriers*>(smem);
    unsigned char* phase = smem + params.layout.phase;
    KvPlan& plan = *reinterpret_cast<KvPlan*>(smem + params.layout.plan);

    Ring ring(smem + params.layout.ring + warp * stages * ATTN_SLOT_BYTES, ATTN_SLOT_BYTES,
              barriers.rings + warp * stages, stages);
    unsigned char* reduce_slots = smem + params.layout.reduce + warp * UnitReduce::slot_bytes(batch, cluster);
    UnitReduce qkv_reduce(reduce_slots, barriers.reduce[0] + warp, cluster, rank);
    UnitReduce out_reduce(reduce_slots, barriers.reduce[1] + warp, cluster, rank);
    const RowScales scales(smem + params.layout.sums, &barriers.scales, cluster, rank);
    const KvCombine<D> combine(phase, barriers.combine, params.shape);
    if (lane == 0) {
        ring.init();
        qkv_reduce.init();
        out_reduce.init();
        if (warp == 0) {
            scales.init(batch);
            combine.init();
            StreamedX::init(barriers.x);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();

    const Slice hidden_slice = slice_of(hidden, rank, cluster);
    const uint32_t qkv_units = (args.num_heads + 2 * args.num_kv_heads) * (D / UNIT_ROWS);
    const Units qkv = units_of(args.qkv, qkv_units, hidden, index, num_clusters, hidden_slice);
    // Kept in shared memory: registers are short in between.
    Units& out = reinterpret_cast<Units*>(smem + params.layout.units)[warp];
    if (lane == 0) {
        out = units_of(args.out, hidden / UNIT_ROWS, attended_cols, index, num_clusters,
                       slice_of(attended_cols, rank, cluster));
    }
    UnitSource qkv_source(qkv);
    ring.refill(qkv_source);

    ptx::cluster_wait();
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    load_normed(phase, {args.residual, args.delta, args.norm, args.residual_out, hidden}, batch, hidden_slice, scales,
                index, num_clusters);
    if (warp == LINEAR_WARPS - 1) {
        plan_kv(plan, args.context_lens, batch, args.window);
    }
    __syncthreads();

    const KvWalk walk(plan, params.work, index);
    const int32_t state_index = warp * cluster + rank;
    Chained<UnitSource, Chained<KvSource<D>, UnitSource>> source{
        qkv_source, {KvSource<D>(walk, params.cache, state_index), UnitSource(out)}};
    ring.refill(source);
    ResidentX hidden_x(phase, hidden_slice);
    project<kTiles>(ring, source, qkv, hidden_x, batch, qkv_reduce, QkvEpilogue<D>{args, scales, params.projected});
    scales.wait();
    grid_barrier(params.barrier);

    const WarpAttention<D> attention{params.projected, params.cache, params.rows, combine, state_index};
    attention.run(walk, ring, source.second);
    ptx::fence_proxy_async_global();
    grid_barrier(params.barrier);

    StreamedX attended_x(phase, params.layout.phase_room, barriers.x, params.rows.attended, batch, out.slice);
    attended_x.start(out.rounds());
    prefetch_share(args.prefetch, args.prefetch_bytes);
    const auto store = [&](uint32_t unit, int n, const float (&c)[4]) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t token = 8 * n + lane % 4 * 2 + i % 2, row = UNIT_ROWS * unit + lane / 4 + i / 2 * 8;
            if (token < batch) {
                args.delta_out[static_cast<uint64_t>(token) * hidden + row] = c[i] + bf16_or(args.out_bias, row, 0.0f);
            }
        }
    };
    UnitSource& out_source = source.second.second;
    project<kTiles>(ring, out_source, out, attended_x, batch, out_reduce, store);
}

using Kernel = void (*)(AttentionParams);

template <int D>
Kernel kernel_for(uint32_t batch) {
    return batch <= 8    ? attention_block<D, 1>
           : batch <= 16 ? attention_block<D, 2>
           : batch <= 32 ? attention_block<D, 4>
                         : attention_block<D, 8>;
}

Kernel kernel_for(const fl_attention_args& args) {
    return args.head_dim == 64 ? kernel_for<64>(args.batch) : kernel_for<128>(args.batch);
}

bool valid(const fl_attention_args& args) {
    const fl_launch& launch = args.launch;
    return args.version == FL_CUDA_API && args.batch >= 1 && args.batch <= ATTN_MAX_BATCH &&
           (args.head_dim == 64 || args.head_dim == 128) && args.num_kv_heads >= 1 && args.num_heads >= 1 &&
           args.num_heads % args.num_kv_heads == 0 && args.block_size >= 8 &&
           (args.block_size & (args.block_size - 1)) == 0 && args.table_width >= 1 && args.window >= 0 &&
           launch.cluster >= 1 && launch.cluster <= args.head_dim / 16 &&
           (launch.cluster & (launch.cluster - 1)) == 0 && launch.num_clusters >= 1 && launch.stages >= 1 &&
           launch.stages <= MAX_STAGES && args.hidden % SLICE_COLS == 0 && args.hidden >= SLICE_COLS * launch.cluster;
}

LaunchShape shape_of(const fl_attention_args& args) {
    return {static_cast<uint32_t>(args.launch.num_clusters),
            static_cast<uint32_t>(args.launch.cluster),
            LINEAR_THREADS,
            AttentionLayout(args).end,
            args.launch.dependent != 0,
            args.stream};
}

} // namespace
} // namespace fuseline

using namespace fuseline;

int64_t fl_cuda_attention_workspace(const fl_attention_args* args) {
    return AttentionWorkspace(*args).end;
}

int fl_cuda_attention_limits(const fl_attention_args* args, fl_limits* limits) {
    if (!valid(*args)) {
        return kInvalidValue;
    }
    const LaunchShape shape = shape_of(*args);
    limits->shared_bytes = static_cast<int32_t>(shape.shared_bytes);
    return max_clusters(kernel_for(*args), shape, &limits->max_clusters);
}

int fl_cuda_attention_block(const fl_attention_args* args) {
    return valid(*args) ? launch("attention_block", kernel_for(*args), AttentionParams(*args), shape_of(*args))
                        : kInvalidValue;
}
