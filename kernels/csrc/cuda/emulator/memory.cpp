// Who may read and write which bytes: bounds, races, memory read before it was written, missing proxy fences.
//
// Kernels are compiled with -fsanitize=thread, so that the compiler calls __tsan_read4 and its like before every access
// to memory. They are defined here; the sanitizer's own library is not linked.
#include <cstdio>
#include <dlfcn.h>
#include <string>

#include "machine.h"

namespace fuseline::emulator {

namespace {

Machine& machine() {
    return Machine::instance();
}

struct Access {
    const char* what;
    bool write;
    uint32_t actor, step, place;
};

[[noreturn]] void report(const Region& region, size_t cell, const Access& access, const std::string& problem) {
    char text[160];
    std::snprintf(text, sizeof(text), "%s of %s+0x%zx %s", access.what, region.name.c_str(), 2 * cell, problem.c_str());
    char places[64];
    std::snprintf(places, sizeof(places), " [at 0x%x", access.place);
    std::string message = std::string(text) + places;
    const uint32_t before = region.cells[cell].writer_place;
    if (before != 0) {
        std::snprintf(places, sizeof(places), ", last written at 0x%x", before);
        message += places;
    }
    machine().fail(message + "]");
}

// Knows is a function (actor, step) -> bool.
template <class Knows>
void check(Region& region, size_t index, const Access& access, const Knows& knows) {
    Cell& cell = region.cells[index];
    if (cell.writer >= kBarrier) {
        if (cell.writer == kBarrier) {
            report(region, index, access, "touches an mbarrier");
        }
        if (cell.writer == kNobody && !access.write) {
            report(region, index, access, "reads what nobody has written");
        }
    } else if (!knows(cell.writer, cell.written_at)) {
        report(region, index, access,
               "races with the write of " + machine().describe_actor(cell.writer) + ", which it does not wait for");
    }
    if (!access.write) {
        if (cell.several) {
            auto& readers = region.readers[cell.reader];
            for (auto& [actor, step] : readers) {
                if (actor == access.actor) {
                    step = access.step;
                    return;
                }
            }
            readers.emplace_back(access.actor, access.step);
        } else if (cell.reader == kNobody || cell.reader == access.actor || knows(cell.reader, cell.read_at)) {
            cell.reader = access.actor;
            cell.read_at = access.step;
        } else {
            region.readers.push_back({{cell.reader, cell.read_at}, {access.actor, access.step}});
            cell.reader = static_cast<uint32_t>(region.readers.size() - 1);
            cell.several = true;
        }
        return;
    }
    const auto check_reader = [&](uint32_t actor, uint32_t step) {
        if (!knows(actor, step)) {
            report(region, index, access,
                   "races with the read of " + machine().describe_actor(actor) + ", which it does not wait for");
        }
    };
    if (cell.several) {
        for (const auto& [actor, step] : region.readers[cell.reader]) {
            check_reader(actor, step);
        }
        region.readers[cell.reader].clear();
    } else if (cell.reader != kNobody) {
        check_reader(cell.reader, cell.read_at);
    }
    cell.reader = kNobody;
    cell.several = false;
    cell.writer = access.actor;
    cell.written_at = access.step;
    cell.writer_place = access.place;
}

void check_range(Region& region, size_t offset, size_t bytes, const Access& access) {
    const Thread& self = *current;
    const auto knows = [&](uint32_t actor, uint32_t step) {
        return actor == self.actor ? true : self.known.at(kOrdered, actor) >= step;
    };
    for (size_t index = offset / 2; index < (offset + bytes + 1) / 2; ++index) {
        check(region, index, access, knows);
    }
}

void on_access(const void* address, size_t bytes, bool write, void* return_address) {
    Thread* self = current;
    const uint8_t* at = static_cast<const uint8_t*>(address);
    if (self == nullptr || static_cast<size_t>(at - self->stack) < kStackBytes) {
        return;
    }
    Cta& cta = *self->cta;
    const size_t offset = static_cast<size_t>(at - cta.shared.base);
    const char* what = write ? "a store" : "a load";
    if (offset < cta.shared.bytes) {
        access_shared(cta, static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes), write, what,
                      place_of(return_address));
    } else {
        access_global(address, bytes, write, what, place_of(return_address));
    }
}

} // namespace

uint32_t place_of(const void* return_address) {
    static const char* base = nullptr; // of the library of kernels, the only one whose code makes accesses
    const auto* address = static_cast<const char*>(return_address);
    if (static_cast<size_t>(address - base) >= (64u << 20)) {
        Dl_info info;
        base = dladdr(return_address, &info) != 0 ? static_cast<const char*>(info.dli_fbase) : address;
    }
    return static_cast<uint32_t>(address - base);
}

void access_shared(Cta& cta, uint32_t offset, uint32_t bytes, bool write, const char* what, uint32_t place) {
    if (offset + bytes > cta.shared.bytes || (bytes <= 16 && offset % bytes != 0)) {
        machine().fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at shared+" +
                       std::to_string(offset) + " of " + std::to_string(cta.shared.bytes) +
                       ": outside, or not aligned to its size");
    }
    check_range(cta.shared, offset, bytes, {what, write, current->actor, current->clock, place});
}

void access_global(const void* address, size_t bytes, bool write, const char* what, uint32_t place) {
    Region* region = machine().find_buffer(address, bytes);
    if (region == nullptr) {
        Dl_info info;
        if (!write && dladdr(address, &info) != 0) {
            return; // a constant of the library
        }
        char text[120];
        std::snprintf(text, sizeof(text), "%s of %zu bytes outside every buffer [at 0x%x]", what, bytes, place);
        machine().fail(text);
    }
    const size_t offset = static_cast<size_t>(static_cast<const uint8_t*>(address) - region->base);
    if ((write && !region->writable) || (bytes <= 16 && reinterpret_cast<uintptr_t>(address) % bytes != 0)) {
        char text[160];
        std::snprintf(text, sizeof(text),
                      "%s of %zu bytes at %s+0x%zx: read-only, or not aligned to its size [at 0x%x]", what, bytes,
                      region->name.c_str(), offset, place);
        machine().fail(text);
    }
    if (region->writable) {
        check_range(*region, offset, bytes, {what, write, current->actor, current->clock, place});
    }
}

namespace {

// Generic accesses that a copy follows must be known to its issuer, and generic writes fenced.
void check_landing(Region& region, size_t offset, const Copy& copy, const Access& access, Kind fence) {
    const auto knows = [&](uint32_t actor, uint32_t step) { return copy.stamp.knows(kOrdered, actor, step); };
    for (size_t index = offset / 2; index < (offset + copy.bytes + 1) / 2; ++index) {
        const Cell& cell = region.cells[index];
        const bool generic_write = cell.writer < kBarrier && !machine().is_copies(cell.writer);
        if (generic_write && knows(cell.writer, cell.written_at) &&
            !copy.stamp.knows(fence, cell.writer, cell.written_at)) {
            report(region, index, access,
                   "follows a store of " + machine().describe_actor(cell.writer) + " without its proxy fence");
        }
        if (access.write && cell.writer == access.actor && cell.written_at == access.step) {
            report(region, index, access, "writes over another copy of the same phase");
        }
        check(region, index, access, knows);
    }
}

std::string name_copy(const Copy& copy, const char* part) {
    return std::string(part) + " copy that " + machine().describe_actor(copy.stamp.actor) + " started";
}

} // namespace

void land_read(Region& region, size_t offset, const Copy& copy, uint32_t actor, uint32_t step, Kind fence) {
    if (region.writable) {
        const std::string what = name_copy(copy, "the reading part of the");
        check_landing(region, offset, copy, {what.c_str(), false, actor, step, copy.place}, fence);
    }
}

void land_write(Region& region, size_t offset, const Copy& copy, uint32_t actor, uint32_t step) {
    const std::string what = name_copy(copy, "the writing part of the");
    check_landing(region, offset, copy, {what.c_str(), true, actor, step, copy.place}, kSharedFenced);
}

void forget(Region& region) {
    for (Cell& cell : region.cells) {
        if (cell.writer != kNobody) {
            cell = Cell();
            cell.writer = kHost;
        }
    }
    region.readers.clear();
}

} // namespace fuseline::emulator

// ---- what the compiler calls ---------------------------------------------------------------------------------------

using fuseline::emulator::on_access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, unsigned long size) {
    on_access(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long size) {
    on_access(address, size, true, __builtin_return_address(0));
}

#define FL_ACCESS(bytes)                                                                                               \
    void __tsan_read##bytes(void* a) {                                                                                 \
        on_access(a, bytes, false, __builtin_return_address(0));                                                       \
    }                                                                                                                  \
    void __tsan_write##bytes(void* a) {                                                                                \
        on_access(a, bytes, true, __builtin_return_address(0));                                                        \
    }                                                                                                                  \
    void __tsan_unaligned_read##bytes(void* a) {                                                                       \
        on_access(a, bytes, false, __builtin_return_address(0));                                                       \
    }                                                                                                                  \
    void __tsan_unaligned_write##bytes(void* a) {                                                                      \
        on_access(a, bytes, true, __builtin_return_address(0));                                                        \
    }                                                                                                                  \
    void __tsan_volatile_read##bytes(void* a) {                                                                        \
        on_access(a, bytes, false, __builtin_return_address(0));                                                       \
    }                                                                                                                  \
    void __tsan_volatile_write##bytes(void* a) {                                                                       \
        on_access(a, bytes, true, __builtin_return_address(0));                                                        \
    }
FL_ACCESS(1)
FL_ACCESS(2)
FL_ACCESS(4)
FL_ACCESS(8)
FL_ACCESS(16)
#undef FL_ACCESS
}
