#include "team.h"

#include <climits>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <system_error>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>

#include "isa.h"

namespace fuseline {

namespace {

// Longer than the gaps between the pieces of a step, shorter than a scheduler's time slice by far.
constexpr int64_t kSpinNs = 50'000;
// Spinning is for idle cores: a yield that takes longer let somebody else run, perhaps the one that is waited for.
constexpr int64_t kBusyYieldNs = 5'000;

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t(1'000'000'000) + time.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A counter that threads wait on to move.
struct alignas(64) Gate {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};

    void wait_while(uint32_t old, int64_t spin_ns) {
        if (spin_ns > 0) {
            const int64_t deadline = now_ns() + spin_ns;
            int64_t before, after;
            do {
                for (int i = 0; i < 32; ++i) {
                    if (value.load(std::memory_order_acquire) != old)
                        return;
                    relax();
                }
                before = now_ns();
                sched_yield();
                after = now_ns();
            } while (after - before < kBusyYieldNs && after < deadline);
        }
        // Sequentially consistent on both sides: either the opener sees the sleeper, or the sleeper the new value.
        sleepers.fetch_add(1);
        while (value.load() == old)
            syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
        sleepers.fetch_sub(1);
    }

    void open(uint32_t next) {
        value.store(next);
        if (sleepers.load() != 0)
            syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
};

} // namespace

// How far a worker's share has been taken.
struct alignas(64) Taken {
    std::atomic<int64_t> end{0};
};

struct Region {
    Gate barrier;
    alignas(64) std::atomic<int> arrived{0};
    int64_t spin_ns = 0;
    std::vector<Taken> taken; // of each worker's share; 0 after each barrier

    void give_back() {
        for (Taken& share : taken)
            share.end.store(0, std::memory_order_relaxed);
    }
};

Range Worker::take(int64_t n, int64_t most, int owner) const {
    const Range all = share(n, 1, Worker{owner, count, region});
    std::atomic<int64_t>& end = region->taken[owner].end;
    if (end.load(std::memory_order_relaxed) >= all.size())
        return {0, 0};
    const int64_t begin = all.begin + end.fetch_add(most, std::memory_order_relaxed);
    return {std::min(begin, all.end), std::min(begin + most, all.end)};
}

void Worker::barrier() const {
    if (count == 1)
        return;
    Gate& gate = region->barrier;
    const uint32_t generation = gate.value.load(std::memory_order_relaxed);
    if (region->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        region->arrived.store(0, std::memory_order_relaxed);
        region->give_back();
        gate.open(generation + 1);
    } else {
        gate.wait_while(generation, region->spin_ns);
    }
}

struct Team::State {
    std::mutex turn; // held while a region runs or the team is resized
    std::atomic<int> count{1};
    std::vector<int> cores; // empty: nobody is pinned
    std::vector<std::thread> threads;
    Region region;
    Gate start; // opened once per region, and to end the threads
    Gate done;
    std::atomic<int> running{0};
    Erased function = nullptr; // null ends the threads
    void* context = nullptr;

    void serve(int index, uint32_t seen) {
        for (;;) {
            start.wait_while(seen, region.spin_ns);
            ++seen;
            if (function == nullptr)
                return;
            function(context, Worker{index, count, &region});
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1)
                done.open(seen);
        }
    }

    void start_threads() {
        // Spinning with more threads than cores keeps from running those that are waited for.
        cpu_set_t usable;
        const bool known = sched_getaffinity(0, sizeof usable, &usable) == 0;
        region.spin_ns = !known || count <= CPU_COUNT(&usable) ? kSpinNs : 0;
        region.taken = std::vector<Taken>(count);
        const uint32_t seen = start.value.load();
        for (int index = 1; index < count; ++index) {
            try {
                threads.emplace_back([this, index, seen] { serve(index, seen); });
            } catch (const std::system_error&) { // there may be no more: the team is as many as have started
                count = index;
                return;
            }
            if (!cores.empty()) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(cores[index], &set);
                // A core that was taken away meanwhile: better unpinned than not at all.
                pthread_setaffinity_np(threads.back().native_handle(), sizeof set, &set);
            }
        }
    }

    void end_threads() {
        if (threads.empty())
            return;
        function = nullptr;
        start.open(start.value.load() + 1);
        for (std::thread& thread : threads)
            thread.join();
        threads.clear();
    }
};

namespace {
Team* team = nullptr;
}

// The threads of the parent, and perhaps its lock, do not exist in the child; their memory is left alone.
void forget_team_in_child() {
    auto* state = new Team::State;
    state->count = team->state_->count.load();
    state->cores = team->state_->cores;
    team->state_ = state;
}

Team& Team::instance() {
    static const bool made = [] {
        team = new Team(new State); // never freed: its threads may outlive everything else
        pthread_atfork(nullptr, nullptr, forget_team_in_child);
        return true;
    }();
    (void)made;
    return *team;
}

void Team::resize(int count, const int* cores) {
    std::lock_guard<std::mutex> lock(state_->turn);
    state_->end_threads();
    state_->count = std::max(count, 1);
    state_->cores.assign(cores, cores == nullptr ? cores : cores + state_->count);
}

int Team::size() const {
    return state_->count;
}

void Team::run_erased(Erased function, void* context) {
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.turn);
    if (state.count > 1 && state.threads.empty())
        state.start_threads();
    const int count = state.count;
    if (count == 1) { // nothing to share, so no turn to keep: callers that exchange data may run side by side
        lock.unlock();
        return function(context, Worker{0, 1, &state.region});
    }
    const uint32_t seen = state.start.value.load(), done = state.done.value.load();
    state.function = function;
    state.context = context;
    state.region.give_back();
    state.running.store(count - 1, std::memory_order_relaxed);
    state.start.open(seen + 1);
    function(context, Worker{0, count, &state.region});
    state.done.wait_while(done, state.region.spin_ns);
}

} // namespace fuseline

// Sets the size of the process's team; see Team::resize. Returns 0, or -1 for a count out of range.
extern "C" FUSELINE_EXPORT int fl_cpu_team_resize(int count, const int* cores) {
    if (count < 1 || count > 4096)
        return -1;
    fuseline::Team::instance().resize(count, cores);
    return 0;
}

extern "C" FUSELINE_EXPORT int fl_cpu_team_size() {
    return fuseline::Team::instance().size();
}
