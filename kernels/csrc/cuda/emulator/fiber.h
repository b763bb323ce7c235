// Switching between stacks within one host thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuseline::emulator {

// A stack of `bytes` with a page below it that faults; kept for the life of the process.
uint8_t* new_stack(size_t bytes);

// What switch_fiber needs to call `entry`, which never returns, on a fresh stack.
void* prepare_fiber(uint8_t* stack, size_t bytes, void (*entry)());

// Saves where this fiber is into `*from` and goes on where `to` was saved.
void switch_fiber(void** from, void* to);

} // namespace fuseline::emulator
