// Barriers, mbarriers, asynchronous copies, and words that CTAs synchronise on through global memory.
#include <cstring>
#include <string>

#include "machine.h"
#include "ptx.h"

namespace fuseline::emulator {

namespace {

Machine& machine() {
    return Machine::instance();
}

void require(bool holds, const std::string& what) {
    if (!holds) {
        machine().fail(what);
    }
}

uint32_t here(void* return_address) {
    return place_of(return_address);
}

void acquire(const Knowledge& known) {
    current->known.join(known);
}

void end_phase(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) {
        return;
    }
    barrier.arriving.raise(kOrdered, barrier.actor, ++barrier.phase);
    barrier.done = barrier.arriving.take();
    barrier.pending = barrier.expected;
    machine().wake_all(barrier.waiters);
}

// A barrier that the current thread may use: initialised, and known to be.
Mbarrier& usable_barrier(uint32_t address, const char* what) {
    uint32_t offset;
    Cta& cta = cta_of(address, offset);
    Mbarrier& barrier = barrier_at(cta, offset, what);
    const bool through_cluster_barrier = barrier.fenced && cta.cluster->phase > barrier.fenced_in_phase;
    require(through_cluster_barrier || current->stamp().knows(kOrdered, barrier.init_actor, barrier.init_step),
            std::string(what) +
                " uses an mbarrier whose initialisation it does not know of: fence and synchronise first");
    return barrier;
}

void arrive(Mbarrier& barrier) {
    require(barrier.pending != 0,
            "more arrivals at an mbarrier than the " + std::to_string(barrier.expected) + " that its phase expects");
    barrier.arriving.add(current->stamp());
    ++current->clock;
    --barrier.pending;
    end_phase(barrier);
}

void named_barrier(uint32_t index, uint32_t threads, bool wait) {
    require(index < 16 && threads % 32 == 0 && threads != 0,
            "a named barrier is 0 to 15, for a multiple of 32 threads");
    NamedBarrier& barrier = current->cta->named[index];
    require(barrier.arrived == 0 || barrier.threads == threads,
            "arrives at barrier " + std::to_string(index) + " for " + std::to_string(threads) +
                " threads, others for " + std::to_string(barrier.threads));
    barrier.threads = threads;
    barrier.arriving.add(current->stamp());
    ++current->clock;
    Thread* self = current;
    if (wait) {
        barrier.waiters.push_back(self);
    }
    if (++barrier.arrived != threads) {
        if (wait) {
            machine().block({"a barrier of its CTA (number, threads)", index, threads});
        }
        return;
    }
    const Knowledge all = barrier.arriving.take();
    barrier.arrived = 0;
    for (Thread* waiter : barrier.waiters) {
        waiter->known.join(all);
        if (waiter != self) {
            machine().wake(waiter);
        }
    }
    barrier.waiters.clear();
    machine().maybe_preempt();
}

void arrive_at_cluster(bool release) {
    Cluster& cluster = *current->cta->cluster;
    require(!current->cluster_arrived, "arrives twice at the cluster barrier without waiting");
    current->cluster_arrived = true;
    if (release) {
        cluster.arriving.add(current->stamp());
        ++current->clock;
    }
    uint32_t threads = 0;
    for (const Cta* cta : cluster.ctas) {
        threads += cta->running;
        require(cta->running == cta->threads.size(),
                "uses the cluster barrier after a thread of the cluster has ended");
    }
    if (++cluster.arrived == threads) {
        cluster.arrived = 0;
        ++cluster.phase;
        cluster.done = cluster.arriving.take();
        for (Thread* waiter : cluster.waiters) {
            machine().wake(waiter);
        }
        cluster.waiters.clear();
    }
}

void check_copy(uint32_t bytes, uint32_t shared, const void* other) {
    const uint64_t all = bytes | shared | reinterpret_cast<uintptr_t>(other);
    require(bytes != 0 && all % 16 == 0,
            "a bulk copy of " + std::to_string(bytes) + " bytes: its size or an address is not a multiple of 16");
}

Cta& target_of(uint32_t address, uint32_t bytes, uint32_t& offset) {
    Cta& cta = cta_of(address, offset);
    require(offset + bytes <= cta.shared.bytes, "a copy of " + std::to_string(bytes) + " bytes to shared+" +
                                                    std::to_string(offset) + " of " + std::to_string(cta.shared.bytes));
    require(cta.running != 0, "sends to CTA " + std::to_string(cta.index) + ", which has ended");
    return cta;
}

Copy new_copy(uint32_t target, uint32_t bytes, uint32_t barrier, uint32_t place) {
    Copy copy{};
    copy.target = &target_of(target, bytes, copy.target_offset);
    copy.bytes = bytes;
    Cta& signalled = cta_of(barrier, copy.barrier_offset);
    require(&signalled == copy.target, "a copy completes on an mbarrier of another CTA than the one it writes to");
    usable_barrier(barrier, "a copy");
    copy.stamp = current->stamp();
    copy.place = place;
    return copy;
}

} // namespace

Cta& cta_of(uint32_t address, uint32_t& offset) {
    Cta& self = *current->cta;
    const uint32_t rank_plus_one = address >> kRankShift;
    require(rank_plus_one <= self.cluster->ctas.size(), "an address of a CTA outside the cluster");
    Cta& cta = rank_plus_one == 0 ? self : *self.cluster->ctas[rank_plus_one - 1];
    offset = (address & ((1u << kRankShift) - 1)) - kSharedBase;
    require(offset < cta.shared.bytes, "shared address " + std::to_string(address) + " is outside shared memory");
    return cta;
}

Mbarrier& barrier_at(Cta& cta, uint32_t offset, const char* what) {
    const auto found = cta.barriers.find(offset);
    require(found != cta.barriers.end(), std::string(what) + " uses shared+" + std::to_string(offset) + " of CTA " +
                                             std::to_string(cta.index) + ", which is not an initialised mbarrier");
    return found->second;
}

void complete_bytes(Cta& cta, uint32_t offset, const Copy& copy) {
    Mbarrier& barrier = barrier_at(cta, offset, "a copy");
    barrier.bytes -= copy.bytes;
    require(-barrier.bytes < (1 << 20), "an mbarrier has counted 2^20 bytes that nobody expects");
    barrier.arriving.add(copy.stamp);
    end_phase(barrier);
}

Index thread_index() {
    return {current->index};
}
Index block_index() {
    return {current->cta->index};
}
Index grid_size() {
    return {current->cta->grid->launch.clusters * current->cta->grid->launch.cluster};
}
Index block_size() {
    return {current->cta->grid->launch.threads};
}
unsigned char* dynamic_shared() {
    return current->cta->shared.base;
}

void sync_threads() {
    named_barrier(0, (static_cast<uint32_t>(current->cta->threads.size()) + 31) / 32 * 32, true);
}

} // namespace fuseline::emulator

namespace fuseline::ptx {

using namespace emulator;

uint32_t shared_address(const void* pointer) {
    const Region& shared = current->cta->shared;
    const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - shared.base;
    require(offset >= 0 && static_cast<size_t>(offset) <= shared.bytes,
            "takes the shared address of what is elsewhere");
    return kSharedBase + static_cast<uint32_t>(offset);
}

uint32_t map_to_rank(uint32_t shared, uint32_t rank) {
    require(shared >> kRankShift == 0, "maps an address that is not of its own shared memory");
    require(rank < current->cta->cluster->ctas.size(),
            "maps to rank " + std::to_string(rank) + " of a smaller cluster");
    return shared | (rank + 1) << kRankShift;
}

uint32_t cluster_rank() {
    return current->cta->rank;
}
uint32_t cluster_size() {
    return static_cast<uint32_t>(current->cta->cluster->ctas.size());
}

void mbarrier_init(uint32_t shared, uint32_t arrivals) {
    uint32_t offset;
    Cta& cta = cta_of(shared, offset);
    require(&cta == current->cta && offset % 8 == 0, "initialises an mbarrier that is a peer's or not aligned to 8");
    require(arrivals > 0 && arrivals < (1 << 20), "an mbarrier for " + std::to_string(arrivals) + " arrivals");
    require(cta.barriers.count(offset) == 0, "initialises the mbarrier at shared+" + std::to_string(offset) + " twice");
    access_shared(cta, offset, 8, true, "mbarrier_init", here(__builtin_return_address(0)));
    for (uint32_t i = 0; i < 4; ++i) {
        cta.shared.cells[offset / 2 + i].writer = kBarrier;
    }
    Mbarrier& barrier = cta.barriers[offset];
    barrier.expected = barrier.pending = arrivals;
    barrier.actor = machine().new_copies_actor(cta, offset);
    barrier.init_actor = current->actor;
    barrier.init_step = current->clock;
}

void fence_mbarrier_init() {
    for (auto& [offset, barrier] : current->cta->barriers) {
        if (barrier.init_actor == current->actor && !barrier.fenced) {
            barrier.fenced = true;
            barrier.fenced_in_phase = current->cta->cluster->phase;
        }
    }
}

void mbarrier_arrive(uint32_t shared) {
    arrive(usable_barrier(shared, "an arrival"));
    machine().maybe_preempt();
}

void mbarrier_arrive_expect_tx(uint32_t shared, uint32_t bytes) {
    Mbarrier& barrier = usable_barrier(shared, "an arrival");
    barrier.bytes += bytes;
    require(barrier.bytes < (1 << 20), "expects 2^20 bytes or more in one phase");
    arrive(barrier);
    machine().maybe_preempt();
}

bool mbarrier_try_wait(uint32_t shared, uint32_t parity) {
    require(parity <= 1, "waits for parity " + std::to_string(parity));
    require(shared >> kRankShift == 0, "waits on a peer's mbarrier");
    machine().maybe_preempt();
    Mbarrier& barrier = usable_barrier(shared, "a wait");
    if ((barrier.phase & 1) == parity) {
        return false;
    }
    acquire(barrier.done);
    return true;
}

void mbarrier_wait(uint32_t shared, uint32_t parity) {
    while (!mbarrier_try_wait(shared, parity)) {
        uint32_t offset;
        Cta& cta = cta_of(shared, offset);
        Mbarrier& barrier = barrier_at(cta, offset, "a wait");
        if ((barrier.phase & 1) != parity) {
            continue;
        }
        barrier.waiters.push_back(current);
        machine().block({"an mbarrier", offset, parity});
    }
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    check_copy(bytes, shared, global);
    require(machine().find_buffer(global, bytes) != nullptr,
            "a bulk copy of " + std::to_string(bytes) + " bytes from outside every buffer");
    Copy copy = new_copy(shared, bytes, barrier, here(__builtin_return_address(0)));
    copy.source = static_cast<const uint8_t*>(global);
    machine().start_copy(std::move(copy));
    machine().maybe_preempt();
}

void bulk_send(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_barrier) {
    check_copy(bytes, remote | shared, nullptr);
    uint32_t offset;
    Cta& source = cta_of(shared, offset);
    require(&source == current->cta && offset + bytes <= source.shared.bytes,
            "a bulk copy of " + std::to_string(bytes) + " bytes from outside its shared memory");
    Copy copy = new_copy(remote, bytes, remote_barrier, here(__builtin_return_address(0)));
    copy.source_cta = &source;
    copy.source_offset = offset;
    machine().start_copy(std::move(copy));
    machine().maybe_preempt();
}

void bulk_prefetch_l2(const void* global, uint32_t bytes) {
    check_copy(bytes, 0, global);
    require(machine().find_buffer(global, bytes) != nullptr, "prefetches from outside every buffer");
}

void store_async(uint32_t remote, const void* value, uint32_t bytes, uint32_t remote_barrier) {
    require(remote % bytes == 0, "st_async to an address that is not a multiple of its size");
    Copy copy = new_copy(remote, bytes, remote_barrier, here(__builtin_return_address(0)));
    std::memcpy(copy.value, value, bytes);
    machine().start_copy(std::move(copy));
    machine().maybe_preempt();
}

void load_remote_bytes(uint32_t remote, void* value, uint32_t bytes) {
    machine().maybe_preempt();
    uint32_t offset;
    Cta& cta = cta_of(remote, offset);
    require(cta.running != 0, "loads from CTA " + std::to_string(cta.index) + ", which has ended");
    access_shared(cta, offset, bytes, false, "a remote load", here(__builtin_return_address(0)));
    std::memcpy(value, cta.shared.base + offset, bytes);
}

void fence_proxy_async() {
    current->fenced[kSharedFenced] = current->clock++;
}
void fence_proxy_async_global() {
    current->fenced[kGlobalFenced] = current->clock++;
}

void cluster_arrive() {
    arrive_at_cluster(true);
}
void cluster_arrive_relaxed() {
    arrive_at_cluster(false);
}

void cluster_wait() {
    Cluster& cluster = *current->cta->cluster;
    require(current->cluster_arrived, "waits at the cluster barrier without arriving");
    current->cluster_arrived = false;
    if (current->cluster_phase == cluster.phase) {
        cluster.waiters.push_back(current);
        machine().block({"the cluster barrier", 0, 0});
    }
    current->cluster_phase = cluster.phase;
    acquire(cluster.done);
    machine().maybe_preempt();
}

void named_barrier_sync(uint32_t barrier, uint32_t threads) {
    named_barrier(barrier, threads, true);
}
void named_barrier_arrive(uint32_t barrier, uint32_t threads) {
    named_barrier(barrier, threads, false);
}

// ---- through global memory -----------------------------------------------------------------------------------------

namespace {

uint32_t* checked_word(const uint32_t* global) {
    Region* region = machine().find_buffer(global, 4);
    require(region != nullptr && region->writable && reinterpret_cast<uintptr_t>(global) % 4 == 0,
            "synchronises on a word outside every writable buffer");
    machine().maybe_preempt();
    return const_cast<uint32_t*>(global);
}

void release_to(SyncWord& word, bool keep) {
    Merged merged;
    if (keep) {
        merged.add({word.released, current->actor, {}});
    }
    merged.add(current->stamp());
    word.released = merged.take();
    ++current->clock;
    machine().wake_all(word.waiters);
}

} // namespace

uint32_t load_acquire(const uint32_t* global) {
    const uint32_t value = *checked_word(global);
    acquire(machine().sync_word(global).released);
    return value;
}

void store_release(uint32_t* global, uint32_t value) {
    *checked_word(global) = value;
    release_to(machine().sync_word(global), false);
}

void add_release(uint32_t* global, uint32_t value) {
    *checked_word(global) += value;
    release_to(machine().sync_word(global), true);
}

uint32_t fetch_add_acq_rel(uint32_t* global, uint32_t value) {
    uint32_t* word = checked_word(global);
    const uint32_t before = *word;
    *word = before + value;
    acquire(machine().sync_word(global).released);
    release_to(machine().sync_word(global), true);
    return before;
}

void wait_at_least(const uint32_t* global, uint32_t value) {
    while (static_cast<int32_t>(load_acquire(global) - value) < 0) {
        machine().sync_word(global).waiters.push_back(current);
        machine().block({"a word in global memory to come to a value (value now, wanted)", *global, value});
    }
}

void wait_top_bit_change(const uint32_t* global, uint32_t before) {
    while (((load_acquire(global) ^ before) & 0x80000000u) == 0) {
        machine().sync_word(global).waiters.push_back(current);
        machine().block({"bit 31 of a word in global memory to change (value now, before)", *global, before});
    }
}

void atomic_add_floats(float* global, const float* values, int count) {
    Region* region = machine().find_buffer(global, 4 * static_cast<size_t>(count));
    require(region != nullptr && region->writable, "adds outside every writable buffer");
    machine().maybe_preempt();
    for (int i = 0; i < count; ++i) {
        global[i] += values[i];
    }
}

void grid_wait() {
    if (current->cta->grid->launch.dependent) {
        machine().wait_for_grids_before();
    }
}

void grid_launch_dependents() {
    current->cta->triggered = true;
}

uint64_t clock_ticks() {
    return machine().steps();
}

} // namespace fuseline::ptx
