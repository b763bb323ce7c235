#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "fiber.h"

namespace fuseline::emulator {

Thread* current = nullptr;

namespace {

struct Broken {};
void* main_stack_pointer = nullptr;

void fiber_main() {
    current->cta->grid->launch.body();
    Machine::instance().end_thread();
}

std::string hex(uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%x", value);
    return text;
}

} // namespace

Machine& Machine::instance() {
    static Machine machine;
    return machine;
}

void Machine::reset(uint64_t seed, uint32_t max_resident) {
    clean_up();
    generator_.seed(seed * 0x9e3779b97f4a7c15ull + 1);
    policy_ = random(3);
    const uint32_t landing[] = {2, 8, 64, 512};
    land_one_in_ = landing[random(4)];
    const uint32_t preempting[] = {0, 4, 32};
    preempt_one_in_ = preempting[random(3)];
    max_resident_ = max_resident;
    buffers_.clear();
    queue_.clear();
    error_.clear();
    steps_ = 0;
}

void Machine::add_buffer(const std::string& name, void* base, size_t bytes, bool writable, bool written) {
    auto region = std::make_unique<Region>();
    region->name = name;
    region->base = static_cast<uint8_t*>(base);
    region->bytes = bytes;
    region->writable = writable;
    if (writable) {
        region->cells.resize((bytes + 1) / 2);
        for (Cell& cell : region->cells) {
            cell.writer = written ? kHost : kNobody;
        }
    }
    buffers_.push_back(std::move(region));
    std::sort(buffers_.begin(), buffers_.end(), [](auto& a, auto& b) { return a->base < b->base; });
}

Region* Machine::find_buffer(const void* address, size_t bytes) {
    const uint8_t* at = static_cast<const uint8_t*>(address);
    auto after = std::upper_bound(buffers_.begin(), buffers_.end(), at,
                                  [](const uint8_t* a, const auto& region) { return a < region->base; });
    if (after == buffers_.begin()) {
        return nullptr;
    }
    Region* region = std::prev(after)->get();
    return at + bytes <= region->base + region->bytes ? region : nullptr;
}

void Machine::fail(const std::string& what) {
    error_ = (current != nullptr ? describe(*current) + ": " : std::string()) + what;
    if (current == nullptr) {
        throw Broken();
    }
    void* forgotten;
    switch_fiber(&forgotten, main_stack_pointer);
    __builtin_unreachable();
}

void Machine::block(const Wait& wait) {
    Thread* self = current;
    self->wait = wait;
    Warp& warp = *self->warp;
    warp.ready &= ~(1u << (self->index % 32));
    if (warp.ready == 0) {
        ready_[warp.place] = ready_.back();
        ready_[warp.place]->place = warp.place;
        ready_.pop_back();
    }
    switch_fiber(&self->stack_pointer, main_stack_pointer);
}

void Machine::wake(Thread* thread) {
    Warp& warp = *thread->warp;
    if (warp.ready == 0) {
        warp.place = ready_.size();
        ready_.push_back(&warp);
    }
    warp.ready |= 1u << (thread->index % 32);
}

void Machine::wake_all(std::vector<Thread*>& waiters) {
    for (Thread* waiter : waiters) {
        wake(waiter);
    }
    waiters.clear();
}

void Machine::maybe_preempt() {
    if (preempt_one_in_ != 0 && random(preempt_one_in_) == 0) {
        switch_fiber(&current->stack_pointer, main_stack_pointer);
    }
}

void Machine::end_thread() {
    Thread& self = *current;
    Cta& cta = *self.cta;
    Grid& grid = *cta.grid;
    self.ended = true;
    grid.finishing.add(self.stamp());
    if (--cta.running == 0) {
        check_cta_end(cta);
        --resident_;
        if (++grid.ended == grid.launch.clusters * grid.launch.cluster) {
            grid.done = grid.finishing.take();
            for (Grid& later : grids_) {
                wake_all(later.waiters);
            }
        }
    }
    block({"nothing: it has ended", 0, 0});
    __builtin_unreachable();
}

void Machine::check_cta_end(Cta& cta) {
    for (const Copy& copy : copies_) {
        if (copy.target == &cta || copy.source_cta == &cta) {
            fail("its CTA ends while a copy of " + std::to_string(copy.bytes) + " bytes " +
                 (copy.target == &cta ? "to its shared+" + hex(copy.target_offset)
                                      : "from its shared+" + hex(copy.source_offset)) +
                 " is in flight");
        }
    }
    for (auto& [offset, barrier] : cta.barriers) {
        if (barrier.pending != barrier.expected || barrier.bytes != 0) {
            fail("its CTA ends in the middle of phase " + std::to_string(barrier.phase) +
                 " of the mbarrier at shared+" + hex(offset) + ": " + std::to_string(barrier.pending) +
                 " arrivals and " + std::to_string(barrier.bytes) + " bytes to come");
        }
        require_known(cta, barrier.actor, barrier.copied_in, "a copy to it has landed, which it might have missed");
    }
    for (const auto& [actor, step] : cta.sent) {
        require_known(cta, actor, step, "a copy from it has landed, which it might have missed");
    }
}

// Whether a copy had landed by chance or was waited for.
void Machine::require_known(const Cta& cta, uint32_t actor, uint32_t step, const std::string& what) {
    for (const Thread& thread : cta.threads) {
        if (thread.known.at(kOrdered, actor) >= step) {
            return;
        }
    }
    fail("its CTA ends and " + what + ": none of its threads knows of step " + std::to_string(step) + " of " +
         describe_actor(actor));
}

void Machine::wait_for_grids_before() {
    Grid& grid = *current->cta->grid;
    for (Grid& before : grids_) {
        if (&before == &grid) {
            return;
        }
        while (before.ended != before.launch.clusters * before.launch.cluster) {
            grid.waiters.push_back(current);
            block({"the grids before, in grid_wait", 0, 0});
        }
        current->known.join(before.done);
    }
}

uint32_t Machine::new_copies_actor(const Cta& cta, uint32_t offset) {
    copies_actors_[actors_] =
        "a copy of the mbarrier at shared+" + hex(offset) + " of CTA " + std::to_string(cta.index);
    return actors_++;
}

std::string Machine::describe(const Thread& thread) const {
    return thread.cta->grid->launch.name + ", CTA " + std::to_string(thread.cta->index) + ", thread " +
           std::to_string(thread.index);
}

std::string Machine::describe_actor(uint32_t actor) const {
    const auto copies = copies_actors_.find(actor);
    if (copies != copies_actors_.end()) {
        return copies->second;
    }
    for (const Grid& grid : grids_) {
        for (const Cta& cta : grid.ctas) {
            if (actor - cta.threads.front().actor < cta.threads.size()) {
                return describe(cta.threads[actor - cta.threads.front().actor]);
            }
        }
    }
    return "someone";
}

// ---- grids ---------------------------------------------------------------------------------------------------------

bool Machine::may_begin(size_t index) const {
    for (size_t i = 0; i < index; ++i) {
        const Grid& before = grids_[i];
        const uint32_t size = before.launch.clusters * before.launch.cluster;
        if (before.ended == size) {
            continue;
        }
        if (!grids_[index].launch.dependent || i + 1 != index || before.started != size) {
            return false;
        }
        for (const Cta& cta : before.ctas) {
            if (!cta.triggered && cta.running != 0) {
                return false;
            }
        }
    }
    return true;
}

void Machine::begin(Grid& grid) {
    bool alone = true;
    for (const Grid& other : grids_) {
        alone = alone && (!other.begun || other.ended == other.launch.clusters * other.launch.cluster);
    }
    if (alone) { // everything so far is behind a kernel boundary
        actors_ = 0;
        copies_actors_.clear();
        sync_words_.clear();
        for (auto& buffer : buffers_) {
            forget(*buffer);
        }
        for (Grid& other : grids_) {
            other.done = Knowledge();
            release(other);
        }
        last_ = nullptr;
    }
    grid.begun = true;
}

void Machine::release(Grid& grid) {
    for (Cta& cta : grid.ctas) {
        for (Thread& thread : cta.threads) {
            free_stacks_.push_back(thread.stack);
        }
    }
    grid.ctas.clear();
    grid.clusters.clear();
}

void Machine::start_cluster(Grid& grid) {
    const Launch& launch = grid.launch;
    grid.clusters.emplace_back();
    Cluster& cluster = grid.clusters.back();
    for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
        grid.ctas.emplace_back();
        Cta& cta = grid.ctas.back();
        cta.grid = &grid;
        cta.cluster = &cluster;
        cta.index = grid.started++;
        cta.rank = rank;
        cta.running = launch.threads;
        cta.storage.assign(launch.shared_bytes + 2048, 0xff); // NaN in every float format
        uint8_t* start = cta.storage.data();
        cta.shared.base = start + (1024 - reinterpret_cast<uintptr_t>(start) % 1024);
        cta.shared.bytes = launch.shared_bytes;
        cta.shared.name = "shared";
        cta.shared.cells.resize((launch.shared_bytes + 1) / 2);
        cluster.ctas.push_back(&cta);
        ++resident_;
        for (uint32_t index = 0; index < launch.threads; ++index) {
            if (index % 32 == 0) {
                cta.warps.emplace_back();
                cta.warps.back().cta = &cta;
                cta.warps.back().index = index / 32;
                cta.warps.back().priority = random(1 << 20);
            }
            cta.threads.emplace_back();
            Thread& thread = cta.threads.back();
            thread.cta = &cta;
            thread.warp = &cta.warps.back();
            thread.index = index;
            thread.actor = actors_++;
            if (free_stacks_.empty()) {
                free_stacks_.push_back(new_stack(kStackBytes));
            }
            thread.stack = free_stacks_.back();
            free_stacks_.pop_back();
            thread.stack_pointer = prepare_fiber(thread.stack, kStackBytes, fiber_main);
            wake(&thread);
        }
    }
}

void Machine::start_grids() {
    for (size_t i = 0; i < grids_.size(); ++i) {
        Grid& grid = grids_[i];
        const uint32_t size = grid.launch.clusters * grid.launch.cluster;
        if (grid.started == size) {
            continue;
        }
        if (!may_begin(i)) {
            return;
        }
        if (!grid.begun) {
            begin(grid);
        }
        while (grid.started < size && (max_resident_ == 0 || resident_ + grid.launch.cluster <= max_resident_)) {
            start_cluster(grid);
        }
    }
}

// ---- running -------------------------------------------------------------------------------------------------------

Thread* Machine::pick() {
    Warp* warp = ready_[random(static_cast<uint32_t>(ready_.size()))];
    if (policy_ == 1 && last_ != nullptr && last_->ready != 0 && random(16) != 0) {
        warp = last_;
    } else if (policy_ == 2) {
        for (int i = 0; i < 3; ++i) {
            Warp* other = ready_[random(static_cast<uint32_t>(ready_.size()))];
            warp = other->priority > warp->priority ? other : warp;
        }
        if (random(256) == 0) {
            warp->priority = random(1 << 20);
        }
    }
    last_ = warp;
    uint32_t lane = random(32);
    while ((warp->ready >> lane & 1) == 0) {
        lane = (lane + 1) % 32;
    }
    return &warp->cta->threads[warp->index * 32 + lane];
}

void Machine::land_copy() {
    const uint32_t index = random(static_cast<uint32_t>(copies_.size()));
    const Copy copy = std::move(copies_[index]);
    copies_[index] = std::move(copies_.back());
    copies_.pop_back();
    Cta& target = *copy.target;
    if (target.running == 0) {
        fail("a copy to shared+" + hex(copy.target_offset) + " of CTA " + std::to_string(target.index) +
             " comes after that CTA has ended");
    }
    Mbarrier& barrier = barrier_at(target, copy.barrier_offset, "a copy");
    const uint8_t* from = copy.value;
    if (copy.source_cta != nullptr) {
        from = copy.source_cta->shared.base + copy.source_offset;
        land_read(copy.source_cta->shared, copy.source_offset, copy, barrier.actor, barrier.phase + 1, kSharedFenced);
    } else if (copy.source != nullptr) {
        from = copy.source;
        Region* region = find_buffer(from, copy.bytes);
        land_read(*region, static_cast<size_t>(from - region->base), copy, barrier.actor, barrier.phase + 1,
                  kGlobalFenced);
    }
    land_write(target.shared, copy.target_offset, copy, barrier.actor, barrier.phase + 1);
    std::memcpy(target.shared.base + copy.target_offset, from, copy.bytes);
    barrier.copied_in = barrier.phase + 1;
    if (copy.source_cta != nullptr) {
        copy.source_cta->sent.emplace_back(barrier.actor, barrier.phase + 1);
    }
    complete_bytes(target, copy.barrier_offset, copy);
}

void Machine::start_copy(Copy copy) {
    copies_.push_back(std::move(copy));
    ++current->clock;
}

bool Machine::step() {
    start_grids();
    if (!copies_.empty() && (ready_.empty() || random(land_one_in_) == 0)) {
        land_copy();
        return true;
    }
    if (ready_.empty()) {
        for (const Grid& grid : grids_) {
            if (grid.ended != grid.launch.clusters * grid.launch.cluster) {
                error_ = deadlock();
                return false;
            }
        }
        return false;
    }
    current = pick();
    switch_fiber(&main_stack_pointer, current->stack_pointer);
    current = nullptr;
    ++steps_;
    return error_.empty();
}

bool Machine::run() {
    for (Launch& launch : queue_) {
        grids_.emplace_back();
        grids_.back().launch = std::move(launch);
    }
    queue_.clear();
    try {
        while (step()) {
        }
    } catch (const Broken&) {
    }
    current = nullptr;
    clean_up();
    return error_.empty();
}

std::string Machine::deadlock() const {
    std::map<std::string, uint32_t> waits;
    for (const Grid& grid : grids_) {
        if (grid.started != grid.launch.clusters * grid.launch.cluster) {
            ++waits[grid.launch.name + ": CTAs that have not started wait for room or for the grid before"];
        }
        for (const Cta& cta : grid.ctas) {
            for (const Thread& thread : cta.threads) {
                if (thread.ended) {
                    continue;
                }
                std::string text = grid.launch.name + ", CTA " + std::to_string(cta.index) + ", warp " +
                                   std::to_string(thread.index / 32) + " waits for " + thread.wait.what;
                const auto barrier = cta.barriers.find(thread.wait.offset);
                if (std::strncmp(thread.wait.what, "an mbarrier", 11) == 0 && barrier != cta.barriers.end()) {
                    const Mbarrier& b = barrier->second;
                    text += " at shared+" + hex(thread.wait.offset) + ", parity " + std::to_string(thread.wait.value) +
                            ", in phase " + std::to_string(b.phase) + " with " + std::to_string(b.pending) +
                            " arrivals and " + std::to_string(b.bytes) + " bytes to come";
                } else if (thread.wait.offset != 0 || thread.wait.value != 0) {
                    text += " (" + std::to_string(thread.wait.offset) + ", " + std::to_string(thread.wait.value) + ")";
                }
                ++waits[text];
            }
        }
    }
    std::string report = "deadlock: nobody can go on, and no copy is in flight";
    uint32_t lines = 0;
    for (const auto& [text, count] : waits) {
        report += "\n  " + text + ": " + std::to_string(count) + " threads";
        if (++lines == 24) {
            report += "\n  …";
            break;
        }
    }
    return report;
}

void Machine::clean_up() {
    for (Grid& grid : grids_) {
        release(grid);
    }
    grids_.clear();
    copies_.clear();
    ready_.clear();
    sync_words_.clear();
    copies_actors_.clear();
    last_ = nullptr;
    resident_ = 0;
    actors_ = 0;
}

} // namespace fuseline::emulator
