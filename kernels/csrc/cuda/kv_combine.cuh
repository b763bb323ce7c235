// Folds the softmax states of a node, spread over a cluster's warps, into one: a reduce-scatter in one hop on chip.
//
// Every warp pushes its (largest, sum) to all CTAs and a part of its outputs to each, from registers; CTA `rank` folds
// part `rank` of the head dimensions in order of position. Two sets of slots alternate between items ("epochs"), and
// one mbarrier of each set counts the bytes. An epoch's bytes include a ticket from every CTA, sent when it had folded
// the epoch before; and a warp pushes only when the epoch before is complete. So nothing is overwritten before it is
// read, and no warp falls two phases behind a barrier.
//
// A row of several nodes: each CTA leaves its part of the node's state in global memory, and the last to do so for this
// row, group and part folds them in order. Order, not arrival, decides every sum.
#pragma once

#include "kv_softmax.cuh"

namespace fuseline {

// Where results go. Query heads of a KV head are cut into `parts` groups of at most heads_per_part.
struct AttendedRows {
    uint16_t* attended; // bf16: x of num_heads * D columns (x_index)
    float4* partials;   // [nodes, groups, cluster][part_vectors]
    uint32_t* arrivals; // [batch, groups, cluster], zero between launches
    int32_t num_heads, heads_per_kv, heads_per_part, parts, num_groups, batch;

    __device__ int32_t group_of(const KvItem& item) const { return item.kv_head * parts + item.part; }
    __device__ int32_t first_head_of(const KvItem& item) const {
        return item.kv_head * heads_per_kv + item.part * heads_per_part;
    }
    __device__ int32_t heads_of(const KvItem& item) const {
        return min(heads_per_part, heads_per_kv - item.part * heads_per_part);
    }
};

// Sizes of the slots. Of the 4 lanes with the same g, `lanes` hold heads.
struct CombineShape {
    int32_t cluster, num_states, lanes, outputs; // outputs: mma tiles of 16 dimensions in a CTA's part

    __host__ __device__ static CombineShape of(int32_t head_dim, int32_t heads, int32_t cluster) {
        return {cluster, ATTN_WARPS * cluster, (heads + 1) / 2, head_dim / 16 / cluster};
    }
    __host__ __device__ int32_t part_vectors() const { return (8 * outputs + 1) * lanes; } // float4: o, then (m, l)
    __host__ __device__ int32_t slot_bytes() const { return 16 * num_states * part_vectors(); }
    // Two sets of slots, and of tickets.
    __host__ __device__ int32_t bytes() const { return 2 * (slot_bytes() + 32); }
};

template <int D>
class KvCombine {
  public:
    // `slots`: shape.bytes(); `barriers`: two.
    __device__ KvCombine(unsigned char* slots, uint64_t* barriers, const CombineShape& shape)
        : slots_(slots), barriers_(ptx::shared_address(barriers)), shape_(shape) {}

    // One thread; then fence_mbarrier_init and a cluster barrier.
    __device__ void init() const {
        ptx::mbarrier_init(barriers_, ATTN_WARPS);
        ptx::mbarrier_init(barriers_ + 8, ATTN_WARPS);
    }

    // A warp's state of this epoch, to which tile `tile` belongs.
    __device__ void push(int32_t epoch, const KvSoftmax<D>& softmax, int32_t tile) const {
        const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        wait_before(epoch);
        const float2 sum = reduce_rows(softmax.sum, false);
        if (t >= shape_.lanes) {
            return;
        }
        const int32_t state = tile & (shape_.num_states - 1);
        const uint32_t slot =
            ptx::shared_address(slots_) + (epoch & 1) * shape_.slot_bytes() + 16 * state * shape_.part_vectors();
#pragma unroll
        for (int32_t i = 0; i < KvSoftmax<D>::kOutputs; ++i) {
            const uint32_t rank = i / shape_.outputs, local = i % shape_.outputs;
            const auto& o = softmax.o[i];
            ptx::st_async(ptx::map_to_rank(slot + 16 * vector_of(local), rank), make_float4(o[0], o[1], o[2], o[3]),
                          ptx::map_to_rank(barrier(epoch), rank));
        }
        // Lane g of those that hold these two heads tells CTA g.
        if (g < shape_.cluster) {
            ptx::st_async(ptx::map_to_rank(slot + 16 * sums_vector(), g),
                          make_float4(softmax.largest.x, softmax.largest.y, sum.x, sum.y),
                          ptx::map_to_rank(barrier(epoch), g));
        }
    }

    // All warps of the cluster, each epoch, in order, behind their push if they have any: `arrive`, but one of each CTA
    // `fold`.
    __device__ bool is_folder(int32_t epoch) const {
        return static_cast<int32_t>(threadIdx.x / 32) == epoch % ATTN_WARPS;
    }

    __device__ void arrive(int32_t epoch) const {
        wait_before(epoch);
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive(barrier(epoch));
        }
    }

    __device__ void fold(const KvWalk& walk, int32_t epoch, const AttendedRows& rows) const {
        const int32_t lane = threadIdx.x % 32;
        const KvItem item = walk.item(epoch);
        wait_before(epoch);
        if (lane == 0) {
            const uint32_t tickets = epoch > 0 ? 4 * shape_.cluster : 0;
            ptx::mbarrier_arrive_expect_tx(barrier(epoch), num_states(item) * 16 * shape_.part_vectors() + tickets);
        }
        wait(epoch);
        const auto* slots = reinterpret_cast<const float4*>(slots_ + (epoch & 1) * shape_.slot_bytes());
        const int32_t stride = shape_.part_vectors(), mask = shape_.num_states - 1, first = item.first_tile;
        const auto state = [=](int32_t i, int32_t vector) { return slots[((first + i) & mask) * stride + vector]; };
        float4* partial = partial_of(rows, item, item.node);
        fold_states(state, num_states(item), [&](int32_t i, const float4& total, const float4& o) {
            if (item.num_nodes == 1) {
                write_attended(rows, item, i, total, o);
                return;
            }
            partial[vector_of(i)] = o;
            if (i == 0 && lane < 4) {
                partial[sums_vector()] = total;
            }
        });
        __syncwarp();
        if (walk.has(epoch + 1) && lane < shape_.cluster) {
            const uint32_t ticket = tickets(epoch + 1) + 4 * ptx::cluster_rank();
            ptx::st_async(ptx::map_to_rank(ticket, lane), 1u, ptx::map_to_rank(barrier(epoch + 1), lane));
        }
        if (item.num_nodes > 1 && is_last(rows, item)) {
            const auto node = [&](int32_t i, int32_t vector) {
                return ptx::load_l2(partial_of(rows, item, item.first_node + i) + vector);
            };
            fold_states(node, item.num_nodes, [&](int32_t i, const float4& total, const float4& o) {
                write_attended(rows, item, i, total, o);
            });
        }
    }

  private:
    __device__ int32_t num_states(const KvItem& item) const {
        return min(item.end_tile - item.first_tile, shape_.num_states);
    }
    __device__ uint32_t barrier(int32_t epoch) const { return barriers_ + 8 * (epoch & 1); }
    __device__ uint32_t tickets(int32_t epoch) const {
        return ptx::shared_address(slots_) + 2 * shape_.slot_bytes() + 32 * (epoch & 1);
    }
    __device__ void wait_before(int32_t epoch) const {
        if (epoch > 0) {
            wait(epoch - 1);
        }
    }
    __device__ void wait(int32_t epoch) const { ptx::mbarrier_wait(barrier(epoch), epoch >> 1 & 1); }

    // Vectors of this lane in a part: outputs i of two heads, and their (largest, largest, sum, sum).
    __device__ int32_t vector_of(int32_t i) const {
        const int32_t lane = threadIdx.x % 32;
        return (8 * i + lane / 4) * shape_.lanes + lane % 4;
    }
    __device__ int32_t sums_vector() const {
        return 8 * shape_.outputs * shape_.lanes + static_cast<int32_t>(threadIdx.x % 4);
    }

    __device__ float4* partial_of(const AttendedRows& rows, const KvItem& item, int32_t node) const {
        const int64_t part = static_cast<int64_t>(node) * rows.num_groups + rows.group_of(item);
        return rows.partials + (part * shape_.cluster + ptx::cluster_rank()) * shape_.part_vectors();
    }

    // Folds `count` states; read(i, vector) is a vector of state i. done(i, total, o) gets each of the part's outputs,
    // not yet divided by the sums of `total`. Lane (g, t) weighs every eighth state for all lanes with its t.
    template <class Read, class Done>
    __device__ void fold_states(const Read& read, int32_t count, const Done& done) const {
        const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const bool holds = t < shape_.lanes;
        float2 top = make_float2(-INFINITY, -INFINITY);
        for (int32_t i = g; i < count && holds; i += 8) {
            const float4 one = read(i, sums_vector());
            top = make_float2(fmaxf(top.x, one.x), fmaxf(top.y, one.y));
        }
        top = reduce_rows(top, true);
#pragma unroll 1
        for (int32_t output = 0; output < shape_.outputs; output += 2) {
            const bool both = output + 1 < shape_.outputs;
            float2 sum = make_float2(0.0f, 0.0f);
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f), next = o;
#pragma unroll 1
            for (int32_t first = 0; first < count; first += 8) {
                float2 weight = make_float2(0.0f, 0.0f);
                if (first + g < count && holds) {
                    const float4 one = read(first + g, sums_vector());
                    weight = make_float2(ptx::exp2_approx(one.x - top.x), ptx::exp2_approx(one.y - top.y));
                    sum = make_float2(sum.x + one.z * weight.x, sum.y + one.w * weight.y);
                }
#pragma unroll 4
                for (int32_t i = 0; i < 8; ++i) {
                    const float x = __shfl_sync(0xffffffffu, weight.x, 4 * i + t);
                    const float y = __shfl_sync(0xffffffffu, weight.y, 4 * i + t);
                    if (first + i < count && holds) {
                        add_weighted(o, read(first + i, vector_of(output)), x, y);
                        if (both) {
                            add_weighted(next, read(first + i, vector_of(output + 1)), x, y);
                        }
                    }
                }
            }
            sum = reduce_rows(sum, false);
            const float4 total = make_float4(top.x, top.y, sum.x, sum.y);
            if (holds) {
                done(output, total, o);
            }
            if (holds && both) {
                done(output + 1, total, next);
            }
        }
    }

    __device__ static void add_weighted(float4& sum, const float4& o, float x, float y) {
        sum = make_float4(sum.x + o.x * x, sum.y + o.y * y, sum.z + o.z * x, sum.w + o.w * y);
    }

    __device__ void write_attended(const AttendedRows& rows, const KvItem& item, int32_t i, const float4& total,
                                   const float4& o) const {
        const int32_t lane = threadIdx.x % 32, g = lane / 4, head = 2 * (lane % 4);
        const int32_t output = ptx::cluster_rank() * shape_.outputs + i, heads = rows.heads_of(item);
        const uint32_t col = (rows.first_head_of(item) + head) * D + KvSoftmax<D>::dimension(output, g);
        uint16_t* to = rows.attended + x_index(rows.batch, item.row, col);
        if (head < heads) {
            *reinterpret_cast<uint32_t*>(to) = ptx::pack_bf16x2(o.x / total.z, o.z / total.z);
        }
        if (head + 1 < heads) {
            *reinterpret_cast<uint32_t*>(to + x_bytes(rows.batch, D) / 2) =
                ptx::pack_bf16x2(o.y / total.w, o.w / total.w);
        }
    }

    // Whether all nodes of the row are in place for this group and part, this warp's the last; they are then visible.
    __device__ bool is_last(const AttendedRows& rows, const KvItem& item) const {
        uint32_t before = 0;
        if (threadIdx.x % 32 == 0) {
            const int64_t part = static_cast<int64_t>(item.row) * rows.num_groups + rows.group_of(item);
            uint32_t* arrivals = rows.arrivals + part * shape_.cluster + ptx::cluster_rank();
            before = ptx::fetch_add_acq_rel(arrivals, 1);
            if (before + 1 == static_cast<uint32_t>(item.num_nodes)) {
                *arrivals = 0;
            }
        }
        before = __shfl_sync(0xffffffffu, before, 0);
        __syncwarp();
        return before + 1 == static_cast<uint32_t>(item.num_nodes);
    }

    unsigned char* slots_;
    uint32_t barriers_;
    const CombineShape& shape_;
};

} // namespace fuseline
