#include "fiber.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <ucontext.h>

namespace fuseline::emulator {

uint8_t* new_stack(size_t bytes) {
    constexpr size_t page = 4096;
    void* memory =
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        std::perror("emulator: no memory for the stack of a thread");
        std::abort();
    }
    return static_cast<uint8_t*>(memory) + page;
}

#if defined(__x86_64__)

// The registers that a function must preserve, on the stack; far cheaper than swapcontext, which makes a system call.
asm(".text\n"
    ".type fl_switch_fiber, @function\n"
    "fl_switch_fiber:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size fl_switch_fiber, .-fl_switch_fiber\n");
extern "C" void fl_switch_fiber(void** from, void* to);

void* prepare_fiber(uint8_t* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr; // alignment: at entry the stack is 8 off a multiple of 16, as after a call
    *--top = reinterpret_cast<void*>(entry);
    return top - 6;
}

void switch_fiber(void** from, void* to) {
    fl_switch_fiber(from, to);
}

#else

void* prepare_fiber(uint8_t* stack, size_t bytes, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);
    getcontext(context);
    const size_t used = (sizeof(ucontext_t) + 63) / 64 * 64;
    context->uc_stack.ss_sp = stack + used;
    context->uc_stack.ss_size = bytes - used;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

void switch_fiber(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

#endif

} // namespace fuseline::emulator
