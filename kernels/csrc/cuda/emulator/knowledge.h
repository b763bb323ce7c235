// Vector clocks: what a thread knows to have happened before.
//
// Every actor (a thread, or an mbarrier standing for the copies that complete on it) counts its steps. A thread knows
// step c of actor a if a chain of synchronisation leads from there to it; an access is a race if it conflicts with one
// that its thread does not know. Two more clocks say the same of steps that a proxy fence follows, for shared and for
// global memory: asynchronous copies may touch only those generic writes. (Method: FastTrack, Flanagan and Freund,
// 2009.)
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fuseline::emulator {

enum Kind { kOrdered, kSharedFenced, kGlobalFenced, kKinds };

using Clocks = std::vector<uint32_t>;

// Shared between threads that know the same, so that a barrier among hundreds costs one merge.
struct Knowledge {
    std::shared_ptr<const Clocks> clocks[kKinds];

    uint32_t at(Kind kind, uint32_t actor) const {
        const Clocks* known = clocks[kind].get();
        return known != nullptr && actor < known->size() ? (*known)[actor] : 0;
    }
    void join(const Knowledge& other);
};

// A thread's knowledge at a moment, with its own clock, which lies outside the shared part.
struct Stamp {
    Knowledge known;
    uint32_t actor;
    uint32_t own[kKinds];

    bool knows(Kind kind, uint32_t other, uint32_t step) const {
        return (other == actor ? own[kind] : known.at(kind, other)) >= step;
    }
};

// What arrivals at a barrier know together.
class Merged {
  public:
    void add(const Stamp& stamp);
    void raise(Kind kind, uint32_t actor, uint32_t step);
    // Hands the sum over and starts anew.
    Knowledge take();

  private:
    void add(Kind kind, const std::shared_ptr<const Clocks>& clocks);

    Clocks sums_[kKinds];
    std::shared_ptr<const Clocks> last_[kKinds];
};

} // namespace fuseline::emulator
