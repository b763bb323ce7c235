// The process's team of threads: one parallel region at a time, the same function on every thread, barriers inside.
//
// The calling thread is worker 0; the others are the team's own. All waiting spins briefly, since the pieces of a
// decode step follow one another within microseconds, then sleeps on a futex, so that a team larger than the cores
// it gets is slow but never stuck. Nothing here throws, and nothing a region runs may throw.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fuseline {

struct Region;

struct Range {
    int64_t begin;
    int64_t end;
    int64_t size() const { return end - begin; }
};

// One thread's view of the region that runs.
struct Worker {
    int index; // 0 is the caller
    int count;
    Region* region;

    // Returns once every worker of the region has arrived; what they wrote before is visible after.
    void barrier() const;

    // Calls f(Range) for pieces of [0, n), at most `most` long, until all are taken: those of this worker's share in
    // order, then what others have not come to, since cores that have other work, too, are slower. Every worker calls
    // this with the same n and `most`, no more than once between two barriers.
    template <class F>
    void for_pieces(int64_t n, int64_t most, const F& f) const {
        if (count == 1) {
            if (n > 0)
                f(Range{0, n});
            return;
        }
        for (int step = 0; step < count; ++step)
            for (Range piece; (piece = take(n, most, (index + step) % count)).size() > 0;)
                f(piece);
    }

  private:
    // The next piece of an owner's share, or an empty range.
    Range take(int64_t n, int64_t most, int owner) const;
};

// This worker's contiguous share of [0, n), in multiples of grain (but for the end of n). Shares differ by at most
// one grain.
inline Range share(int64_t n, int64_t grain, const Worker& worker) {
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t begin = grains * worker.index / worker.count, end = grains * (worker.index + 1) / worker.count;
    return {std::min(begin * grain, n), std::min(end * grain, n)};
}

class Team {
  public:
    // The process's own. A forked child gets a new one of the same size, whose threads start when first needed.
    static Team& instance();

    // Sets the number of workers. cores: one per worker to pin it to, of which the first is ignored (the caller is
    // not ours to pin), or null to pin nobody. Waits for a running region to end.
    void resize(int count, const int* cores);

    int size() const;

    // Runs f(const Worker&) on every worker; returns when all have returned. Calls from several threads take turns (or
    // run side by side in a team of one); a region must not start another.
    template <class F>
    void run(F&& f) {
        using Function = std::remove_reference_t<F>;
        run_erased([](void* context, const Worker& worker) { (*static_cast<Function*>(context))(worker); }, &f);
    }

  private:
    using Erased = void (*)(void* context, const Worker& worker);
    void run_erased(Erased function, void* context);

    struct State;
    State* state_;

    explicit Team(State* state) : state_(state) {}
    friend void forget_team_in_child();
};

} // namespace fuseline
