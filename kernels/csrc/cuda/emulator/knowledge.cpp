#include "knowledge.h"

#include <algorithm>
#include <cstddef>

namespace fuseline::emulator {

namespace {

void raise_all(Clocks& into, const Clocks& from) {
    if (into.size() < from.size()) {
        into.resize(from.size(), 0);
    }
    uint32_t* a = into.data();
    const uint32_t* b = from.data();
    for (size_t i = 0; i < from.size(); ++i) {
        a[i] = a[i] > b[i] ? a[i] : b[i];
    }
}

// The lanes of a warp mostly join the same two, one after the other.
struct LastJoin {
    std::shared_ptr<const Clocks> mine, other, result;
};
LastJoin last_join[kKinds];

} // namespace

void Knowledge::join(const Knowledge& other) {
    for (int kind = 0; kind < kKinds; ++kind) {
        std::shared_ptr<const Clocks>& mine = clocks[kind];
        const std::shared_ptr<const Clocks>& theirs = other.clocks[kind];
        if (!theirs || mine == theirs) {
            continue;
        }
        if (!mine) {
            mine = theirs;
            continue;
        }
        LastJoin& last = last_join[kind];
        if (last.mine != mine || last.other != theirs) {
            auto result = std::make_shared<Clocks>(*mine);
            raise_all(*result, *theirs);
            last.mine = mine;
            last.other = theirs;
            if (*result == *mine) {
                last.result = mine;
            } else if (*result == *theirs) {
                last.result = theirs;
            } else {
                last.result = std::move(result);
            }
        }
        mine = last.result;
    }
}

void Merged::add(Kind kind, const std::shared_ptr<const Clocks>& clocks) {
    if (clocks && clocks != last_[kind]) {
        raise_all(sums_[kind], *clocks);
        last_[kind] = clocks;
    }
}

void Merged::add(const Stamp& stamp) {
    for (int kind = 0; kind < kKinds; ++kind) {
        add(static_cast<Kind>(kind), stamp.known.clocks[kind]);
        if (stamp.own[kind] != 0) {
            raise(static_cast<Kind>(kind), stamp.actor, stamp.own[kind]);
        }
    }
}

void Merged::raise(Kind kind, uint32_t actor, uint32_t step) {
    Clocks& sum = sums_[kind];
    if (sum.size() <= actor) {
        sum.resize(actor + 1, 0);
    }
    sum[actor] = std::max(sum[actor], step);
}

Knowledge Merged::take() {
    Knowledge known;
    for (int kind = 0; kind < kKinds; ++kind) {
        if (!sums_[kind].empty()) {
            known.clocks[kind] = std::make_shared<const Clocks>(std::move(sums_[kind]));
        }
        sums_[kind] = Clocks();
        last_[kind].reset();
    }
    return known;
}

} // namespace fuseline::emulator
