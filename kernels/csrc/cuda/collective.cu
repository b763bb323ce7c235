// Micro-kernels: the collectives of cluster.cuh beside the same through global memory, and what DSMEM itself can do.
#include <cstdint>

#include "api.h"
#include "cluster.cuh"
#include "launch.h"

namespace fuseline {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kBarrierBytes = 128;
constexpr int64_t kWordBytes = 128; // a cluster's counter in the workspace, on a line of its own

// ---- off chip ------------------------------------------------------------------------------------------------------

// Where the CTAs of a cluster leave their vectors for each other in global memory; two sets take turns.
class OffChip {
  public:
    __device__ OffChip(void* workspace, uint32_t elements, Place place)
        : vectors_(elements / 4), place_(place), cluster_index_(blockIdx.x / place.cluster),
          word_(static_cast<uint32_t*>(workspace) + cluster_index_ * (kWordBytes / 4)),
          data_(reinterpret_cast<float4*>(static_cast<unsigned char*>(workspace) +
                                          gridDim.x / place.cluster * kWordBytes)) {}

    // Leaves this CTA's vector, and returns where all of the cluster's lie.
    __device__ const float4* exchange(const float4* mine) {
        float4* all = data_ + (epoch_ % 2 * gridDim.x + cluster_index_ * place_.cluster) * vectors_;
        for (uint32_t i = threadIdx.x; i < vectors_; i += kThreads) {
            all[place_.rank * vectors_ + i] = mine[i];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            const uint32_t add = place_.rank == 0 ? 0x80000000u - (place_.cluster - 1) : 1;
            ptx::wait_top_bit_change(word_, ptx::fetch_add_acq_rel(word_, add));
        }
        __syncthreads();
        ++epoch_;
        return all;
    }

  private:
    uint32_t vectors_;
    Place place_;
    uint32_t cluster_index_;
    uint32_t* word_;
    float4* data_;
    uint32_t epoch_ = 0;
};

template <class Op>
class OffChipReduce {
  public:
    __host__ __device__ static uint32_t bytes(uint32_t, uint32_t) { return 0; }
    __device__ OffChipReduce(void* workspace, uint32_t elements, Place place)
        : exchange_(workspace, elements, place), vectors_(elements / 4), place_(place) {}

    __device__ void operator()(float4* data) {
        const float4* all = exchange_.exchange(data);
        for (uint32_t i = threadIdx.x; i < vectors_; i += kThreads) {
            float4 total = ptx::load_l2(all + i);
            for (uint32_t rank = 1; rank < place_.cluster; ++rank) {
                total = combine<Op>(total, ptx::load_l2(all + rank * vectors_ + i));
            }
            data[i] = total;
        }
    }

  private:
    OffChip exchange_;
    uint32_t vectors_;
    Place place_;
};

// ---- kernels -------------------------------------------------------------------------------------------------------

__device__ float4* load_vector(unsigned char* smem, const fl_collective_args& args) {
    float4* data = reinterpret_cast<float4*>(smem + kBarrierBytes);
    const float4* input = reinterpret_cast<const float4*>(args.input) + blockIdx.x * (args.elements / 4);
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(args.elements) / 4; i += kThreads) {
        data[i] = input[i];
    }
    return data;
}

__device__ void store_vectors(float* output, const float4* from, uint32_t vectors) {
    float4* target = reinterpret_cast<float4*>(output) + blockIdx.x * vectors;
    for (uint32_t i = threadIdx.x; i < vectors; i += kThreads) {
        target[i] = from[i];
    }
}

template <class Collective>
__device__ void start(const Collective& collective) {
    if (threadIdx.x == 0) {
        collective.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
}

template <class Collective>
__global__ void __launch_bounds__(kThreads) reduce_on_chip(const __grid_constant__ fl_collective_args args) {
    FL_DYNAMIC_SHARED(smem);
    float4* data = load_vector(smem, args);
    Collective reduce(smem + kBarrierBytes + 4 * args.elements, reinterpret_cast<uint64_t*>(smem), args.elements,
                      Place::here(args.cluster));
    start(reduce);
    for (int repeat = 0; repeat < args.repeats; ++repeat) {
        reduce(data);
    }
    store_vectors(args.output, data, args.elements / 4);
}

template <class Op>
__global__ void __launch_bounds__(kThreads) reduce_off_chip(const __grid_constant__ fl_collective_args args) {
    FL_DYNAMIC_SHARED(smem);
    float4* data = load_vector(smem, args);
    OffChipReduce<Op> reduce(args.workspace, args.elements, Place::here(args.cluster));
    for (int repeat = 0; repeat < args.repeats; ++repeat) {
        reduce(data);
    }
    store_vectors(args.output, data, args.elements / 4);
}

__global__ void __launch_bounds__(kThreads) gather_on_chip(const __grid_constant__ fl_collective_args args) {
    FL_DYNAMIC_SHARED(smem);
    const float4* data = load_vector(smem, args);
    ClusterGather gather(smem + kBarrierBytes + 4 * args.elements, reinterpret_cast<uint64_t*>(smem), args.elements,
                         Place::here(args.cluster));
    start(gather);
    const float4* result = data;
    for (int repeat = 0; repeat < args.repeats; ++repeat) {
        result = gather(data);
        __syncthreads(); // as gather asks, and so that others' elements are seen
    }
    store_vectors(args.output, result, args.cluster * args.elements / 4);
}

__global__ void __launch_bounds__(kThreads) gather_off_chip(const __grid_constant__ fl_collective_args args) {
    FL_DYNAMIC_SHARED(smem);
    const float4* data = load_vector(smem, args);
    const uint32_t vectors = args.cluster * args.elements / 4;
    float4* result = reinterpret_cast<float4*>(smem + kBarrierBytes + 4 * args.elements);
    OffChip exchange(args.workspace, args.elements, Place::here(args.cluster));
    for (int repeat = 0; repeat < args.repeats; ++repeat) {
        const float4* all = exchange.exchange(data);
        for (uint32_t i = threadIdx.x; i < vectors; i += kThreads) {
            result[i] = ptx::load_l2(all + i);
        }
    }
    store_vectors(args.output, result, vectors);
}

using CollectiveKernel = void (*)(fl_collective_args);

struct Variant {
    CollectiveKernel kernel;
    uint32_t bytes; // behind the vector
};

template <class Op>
Variant reduce_variant(const fl_collective_args& args) {
    const uint32_t elements = args.elements, cluster = args.cluster;
    switch (args.form) {
    case FL_ONE_SHOT:
        return {reduce_on_chip<ClusterReduce<Op>>, ClusterReduce<Op>::bytes(elements, cluster)};
    case FL_LOG2:
        return {reduce_on_chip<ClusterReduceLog2<Op>>, ClusterReduceLog2<Op>::bytes(elements, cluster)};
    case FL_SCATTER:
        return {reduce_on_chip<ClusterScatterReduce<Op>>, ClusterScatterReduce<Op>::bytes(elements, cluster)};
    default:
        return {reduce_off_chip<Op>, 0};
    }
}

Variant variant_of(const fl_collective_args& args) {
    if (args.kind != FL_GATHER) {
        return args.kind == FL_SUM ? reduce_variant<Sum>(args) : reduce_variant<Max>(args);
    }
    const uint32_t results = ClusterGather::bytes(args.elements, args.cluster);
    return args.form == FL_ONE_SHOT ? Variant{gather_on_chip, results} : Variant{gather_off_chip, results / 2};
}

bool valid(const fl_collective_args& args) {
    const bool power = args.cluster >= 1 && args.cluster <= 16 && (args.cluster & (args.cluster - 1)) == 0;
    const bool gathers = args.kind == FL_GATHER;
    return args.version == FL_CUDA_API && power && args.num_clusters >= 1 && args.elements >= 4 &&
           args.elements % (args.form == FL_SCATTER ? 4 * args.cluster : 4) == 0 && args.repeats >= (gathers ? 1 : 0) &&
           (args.kind == FL_SUM || args.kind == FL_MAX || gathers) &&
           (args.form == FL_ONE_SHOT || args.form == FL_OFF_CHIP ||
            (!gathers && (args.form == FL_LOG2 || args.form == FL_SCATTER)));
}

LaunchShape shape_of(const fl_collective_args& args) {
    return {static_cast<uint32_t>(args.num_clusters),
            static_cast<uint32_t>(args.cluster),
            kThreads,
            kBarrierBytes + 4 * static_cast<uint32_t>(args.elements) + variant_of(args).bytes,
            false,
            args.stream};
}

// ---- DSMEM itself --------------------------------------------------------------------------------------------------

constexpr uint32_t kSendBytes = 8192;

// Each load's address is what the load before returned.
__device__ uint32_t chase(uint32_t remote, uint32_t repeats) {
    uint32_t offset = 0;
    for (uint32_t i = 0; i < repeats; ++i) {
        offset = ptx::load_remote(remote + offset);
    }
    return offset;
}

__device__ float read_all(uint32_t remote, uint32_t bytes, uint32_t repeats) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < repeats; ++i) {
#pragma unroll 8
        for (uint32_t at = 16 * threadIdx.x; at < bytes; at += 16 * kThreads) {
            const float4 v = ptx::load_remote_vector(remote + at);
            sum += v.x + v.y + v.z + v.w;
        }
    }
    return sum;
}

// Sends to the next rank while receiving from the one before.
__device__ void copy_all(uint32_t source, uint32_t target, uint32_t barrier, uint32_t next, uint32_t bytes,
                         uint32_t repeats) {
    for (uint32_t i = 0; i < repeats; ++i) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(barrier, bytes);
            for (uint32_t at = 0; at < bytes; at += kSendBytes) {
                ptx::bulk_send(ptx::map_to_rank(target, next) + at, source + at, min(kSendBytes, bytes - at),
                               ptx::map_to_rank(barrier, next));
            }
        }
        ptx::mbarrier_wait(barrier, i % 2);
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

__global__ void __launch_bounds__(kThreads) dsmem(const __grid_constant__ fl_dsmem_args args) {
    FL_DYNAMIC_SHARED(smem);
    const Place place = Place::here(args.cluster);
    const uint32_t next = place.peer(1), bytes = args.bytes;
    const uint32_t barrier = ptx::shared_address(smem), buffer = barrier + kBarrierBytes;
    uint32_t* words = reinterpret_cast<uint32_t*>(smem + kBarrierBytes);
    for (uint32_t i = threadIdx.x; i < bytes / 4; i += kThreads) {
        words[i] = args.mode == FL_DSMEM_LATENCY ? (4 * i + 132) % bytes : 0; // a word of the line after the next
    }
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::fence_proxy_async();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const uint64_t start = ptx::clock_ticks();
    if (args.mode == FL_DSMEM_LATENCY) {
        if (threadIdx.x == 0 && chase(ptx::map_to_rank(buffer, next), args.repeats) == ~0u) {
            args.ticks[blockIdx.x] = 0; // never: keeps the loads
        }
    } else if (args.mode == FL_DSMEM_LOADS) {
        if (read_all(ptx::map_to_rank(buffer, next), bytes, args.repeats) != 0.0f) {
            args.ticks[blockIdx.x] = 0;
        }
    } else {
        copy_all(buffer, buffer + bytes, barrier, next, bytes, args.repeats);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        args.ticks[blockIdx.x] = static_cast<int64_t>(ptx::clock_ticks() - start);
    }
    ptx::cluster_arrive(); // peers may still read
    ptx::cluster_wait();
}

} // namespace
} // namespace fuseline

using namespace fuseline;

int64_t fl_cuda_collective_workspace(const fl_collective_args* args) {
    const int64_t vectors = 2 * static_cast<int64_t>(args->num_clusters) * args->cluster;
    return args->num_clusters * kWordBytes + vectors * args->elements * 4;
}

int fl_cuda_collective_limits(const fl_collective_args* args, fl_limits* limits) {
    if (!valid(*args)) {
        return kInvalidValue;
    }
    const LaunchShape shape = shape_of(*args);
    limits->shared_bytes = static_cast<int32_t>(shape.shared_bytes);
    return max_clusters(variant_of(*args).kernel, shape, &limits->max_clusters);
}

int fl_cuda_collective(const fl_collective_args* args) {
    return valid(*args) ? launch("collective", variant_of(*args).kernel, *args, shape_of(*args)) : kInvalidValue;
}

int fl_cuda_dsmem(const fl_dsmem_args* args) {
    const bool ok = args->version == FL_CUDA_API && args->cluster >= 2 && args->cluster <= 16 &&
                    args->num_clusters >= 1 && args->bytes >= 256 && args->bytes % 256 == 0 && args->repeats >= 1;
    if (!ok) {
        return kInvalidValue;
    }
    const uint32_t buffers = args->mode == FL_DSMEM_COPIES ? 2 : 1;
    return launch("dsmem", dsmem, *args,
                  {static_cast<uint32_t>(args->num_clusters), static_cast<uint32_t>(args->cluster), kThreads,
                   kBarrierBytes + buffers * static_cast<uint32_t>(args->bytes), false, args->stream});
}

const char* fl_cuda_error_name(int error) {
    return error_name(error);
}
