// The emulator's side of ../launch.h: launches queue up until fl_emu_run.
#pragma once

#include <cstddef>

namespace fuseline::emulator {

// Copies `bytes` of arguments; `run` calls the kernel with them, on a fiber.
void queue_launch(const char* name, void (*run)(const void* kernel, const void* arguments), const void* kernel,
                  const void* arguments, size_t bytes, const LaunchShape& shape);

// Not instrumented: the copy of the arguments lies outside every buffer.
template <class Args>
__attribute__((no_sanitize("thread"))) void run_kernel(const void* kernel, const void* arguments) {
    reinterpret_cast<void (*)(Args)>(const_cast<void*>(kernel))(*static_cast<const Args*>(arguments));
}

} // namespace fuseline::emulator

namespace fuseline {

constexpr int kInvalidValue = 1;

inline const char* error_name(int error) {
    return error == 0 ? "cudaSuccess" : "cudaErrorInvalidValue";
}

template <class Args>
int launch(const char* name, void (*kernel)(Args), const Args& args, const LaunchShape& shape) {
    if (shape.threads % 32 != 0 || shape.cluster == 0 || shape.clusters == 0) {
        return kInvalidValue;
    }
    emulator::queue_launch(name, emulator::run_kernel<Args>, reinterpret_cast<const void*>(kernel), &args, sizeof(Args),
                           shape);
    return 0;
}

// As many as shared memory has room for on an H200's 132 multiprocessors: 228 KB each, 1 KB a CTA taken by the system.
template <class Args>
int max_clusters(void (*)(Args), const LaunchShape& shape, int32_t* clusters) {
    *clusters = static_cast<int32_t>(132 * (228 * 1024 / (shape.shared_bytes + 1024)) / shape.cluster);
    return 0;
}

} // namespace fuseline
