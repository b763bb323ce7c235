// Launching a kernel that takes one struct, with a cluster shape and, if wanted, before the kernel ahead has ended.
#pragma once

#include "linear_tiles.h"
#include "ptx.cuh"

namespace fuseline {

struct LaunchShape {
    uint32_t clusters;
    uint32_t cluster; // CTAs each
    uint32_t threads;
    uint32_t shared_bytes;
    bool dependent; // programmatic dependent launch: the kernel calls ptx::grid_wait before it reads others' results
    void* stream;
};

} // namespace fuseline

#ifdef FUSELINE_EMULATE
#include "emulator/launch.h"
#else

namespace fuseline {

constexpr int kInvalidValue = cudaErrorInvalidValue;

inline const char* error_name(int error) {
    return cudaGetErrorName(static_cast<cudaError_t>(error));
}

// What a kernel may have, the same at every launch, so that threads which launch different shapes do not take it from
// one another. All of a multiprocessor's memory is shared memory from the start: the split cannot change while a CTA is
// there, and the next kernel's CTA is to come beside it.
template <class Args>
int allow(void (*kernel)(Args), const LaunchShape& shape) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED_BYTES);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    }
    if (error == cudaSuccess && shape.cluster > 8) {
        error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
}

inline cudaLaunchConfig_t configuration(const LaunchShape& shape, cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = shape.cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.clusters * shape.cluster);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    config.attrs = attributes;
    config.numAttrs = shape.dependent ? 2 : 1;
    return config;
}

template <class Args>
int launch(const char*, void (*kernel)(Args), const Args& args, const LaunchShape& shape) {
    if (const int error = allow(kernel, shape)) {
        return error;
    }
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = configuration(shape, attributes);
    return cudaLaunchKernelEx(&config, kernel, args);
}

// Clusters of this shape that are resident at once on the current device.
template <class Args>
int max_clusters(void (*kernel)(Args), const LaunchShape& shape, int32_t* clusters) {
    if (const int error = allow(kernel, shape)) {
        return error;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = configuration(shape, attributes);
    config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

} // namespace fuseline

#endif // FUSELINE_EMULATE
