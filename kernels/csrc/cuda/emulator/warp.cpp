// What the lanes of a warp do together: the last to come does the work for all.
#include <cstring>
#include <string>

#include "machine.h"
#include "ptx.h"

namespace fuseline::emulator {

namespace {

Machine& machine() {
    return Machine::instance();
}

// Each lane brings its argument; `perform` gets all 32.
template <class Argument, class Perform>
void together(const char* what, Argument& argument, const Perform& perform) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    if (warp.lanes != 0 && std::strcmp(warp.together, what) != 0) {
        machine().fail(std::string("comes to ") + what + " while other lanes of its warp are in " + warp.together);
    }
    warp.together = what;
    warp.arguments[self.index % 32] = &argument;
    if (++warp.lanes != 32) {
        machine().block({what, 0, 0});
        return;
    }
    warp.lanes = 0;
    Argument* all[32];
    for (int lane = 0; lane < 32; ++lane) {
        all[lane] = static_cast<Argument*>(warp.arguments[lane]);
    }
    perform(all);
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (lane != self.index % 32) {
            machine().wake(&self.cta->threads[warp.index * 32 + lane]);
        }
    }
    machine().maybe_preempt();
}

void full(uint32_t mask) {
    if (mask != 0xffffffffu) {
        machine().fail("uses a mask of some lanes; only whole warps are emulated");
    }
}

struct Shuffle {
    uint32_t value;
    int source;
    uint32_t result;
};
struct Vote {
    bool predicate;
    uint32_t result;
};
struct Load {
    uint32_t* r;
    uint32_t shared;
    int matrices;
    bool transposed;
    uint32_t place;
};
struct Multiply {
    float* c;
    const uint32_t *a, *b;
};

float half_of(uint32_t packed, int which) {
    return which == 0 ? ptx::bf16_low(packed) : ptx::bf16_high(packed);
}

void load_matrices(Load* (&all)[32]) {
    Cta& cta = *current->cta;
    Thread* last = current;
    for (int matrix = 0; matrix < all[0]->matrices; ++matrix) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; ++row) {
            uint32_t offset;
            const int lane = 8 * matrix + row;
            Cta& from = cta_of(all[lane]->shared, offset);
            current = &cta.threads[last->warp->index * 32 + static_cast<uint32_t>(lane)]; // whose address it is
            if (&from != &cta) {
                machine().fail("ldmatrix of a peer's shared memory");
            }
            access_shared(cta, offset, 16, false, "ldmatrix", all[lane]->place);
            std::memcpy(elements[row], cta.shared.base + offset, 16);
        }
        current = last;
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const uint16_t low = all[0]->transposed ? elements[j][i] : elements[i][j];
            const uint16_t high = all[0]->transposed ? elements[j + 1][i] : elements[i][j + 1];
            all[lane]->r[matrix] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

void multiply(Multiply* (&all)[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r) {
                a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] = half_of(all[lane]->a[r], half);
            }
            for (int r = 0; r < 2; ++r) {
                b[2 * t + 8 * r + half][g] = half_of(all[lane]->b[r], half);
            }
        }
    }
    for (int row = 0; row < 16; ++row) {
        float sums[8];
        const int g = row % 8, first = row / 8 * 2;
        for (int column = 0; column < 8; ++column) {
            sums[column] = all[4 * g + column / 2]->c[first + column % 2];
        }
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) {
                sums[column] += a[row][k] * b[k][column];
            }
        }
        for (int column = 0; column < 8; ++column) {
            all[4 * g + column / 2]->c[first + column % 2] = sums[column];
        }
    }
}

} // namespace

void sync_warp(uint32_t mask) {
    full(mask);
    Thread* self = current;
    together("__syncwarp", self, [](Thread**(&all)[32]) {
        Merged merged;
        for (Thread** lane : all) {
            merged.add((*lane)->stamp());
            ++(*lane)->clock;
        }
        const Knowledge known = merged.take();
        for (Thread** lane : all) {
            (*lane)->known.join(known);
        }
    });
}

uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane) {
    full(mask);
    Shuffle mine{value, source_lane, 0};
    together("a shuffle", mine, [](Shuffle*(&all)[32]) {
        for (Shuffle* lane : all) {
            lane->result = all[lane->source & 31]->value;
        }
    });
    return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
    full(mask);
    Vote mine{predicate, 0};
    together("a vote", mine, [](Vote*(&all)[32]) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
            votes |= static_cast<uint32_t>(all[lane]->predicate) << lane;
        }
        for (Vote* lane : all) {
            lane->result = votes;
        }
    });
    return mine.result;
}

} // namespace fuseline::emulator

namespace fuseline::ptx {

using namespace emulator;

void ldmatrix(uint32_t* r, uint32_t shared, int matrices, bool transposed) {
    Load mine{r, shared, matrices, transposed, place_of(__builtin_return_address(0))};
    together("ldmatrix", mine, load_matrices);
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Multiply mine{c, a, b};
    together("mma", mine, multiply);
}

} // namespace fuseline::ptx
