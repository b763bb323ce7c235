// What tests call from Python: set up buffers, call the kernels' own entry points, then run what they have queued.
#include <cstring>
#include <string>
#include <vector>

#include "../launch.h"
#include "machine.h"

using fuseline::emulator::Machine;

namespace fuseline::emulator {

void queue_launch(const char* name, void (*run)(const void*, const void*), const void* kernel, const void* arguments,
                  size_t bytes, const LaunchShape& shape) {
    const auto* from = static_cast<const uint8_t*>(arguments);
    const std::vector<uint8_t> copy(from, from + bytes);
    Machine::instance().enqueue({name, [=] { run(kernel, copy.data()); }, shape.clusters, shape.cluster, shape.threads,
                                 shape.shared_bytes, shape.dependent});
}

} // namespace fuseline::emulator

extern "C" {

void fl_emu_reset(uint64_t seed, uint32_t max_resident) {
    Machine::instance().reset(seed, max_resident);
}

// `written` as false says that reading before a kernel has written is an error.
void fl_emu_buffer(const char* name, void* base, uint64_t bytes, int writable, int written) {
    Machine::instance().add_buffer(name, base, bytes, writable != 0, written != 0);
}

// 0, or 1 with the reason in `error`.
int fl_emu_run(char* error, uint64_t size) {
    Machine& machine = Machine::instance();
    const bool done = machine.run();
    std::strncpy(error, machine.error().c_str(), size - 1);
    error[size - 1] = 0;
    return done ? 0 : 1;
}

uint64_t fl_emu_steps() {
    return Machine::instance().steps();
}
}
