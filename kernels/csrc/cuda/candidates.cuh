// The best few of many logits: a CTA's among its own, then the grid's among those.
//
// A candidate is a pair of words, compared as one number: the logit's bits, changed so that they sort as unsigned, then
// the complement of its row, so that of equal logits the lower row is better. NaN beats everything, as for torch.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace fuseline {

struct Candidate {
    uint32_t key, not_row;

    __device__ bool operator<(const Candidate& other) const {
        return key != other.key ? key < other.key : not_row < other.not_row;
    }
    __device__ float logit() const { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
    __device__ uint32_t row() const { return ~not_row; }
};

__device__ inline uint32_t sort_key(float logit) {
    const uint32_t bits = __float_as_uint(logit + 0.0f); // one zero
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr Candidate kNoCandidate{0, 0}; // below every logit

// The best of the lanes' candidates; every lane gets it.
__device__ inline Candidate best_of_warp(Candidate mine) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const Candidate other{__shfl_xor_sync(0xffffffffu, mine.key, distance),
                              __shfl_xor_sync(0xffffffffu, mine.not_row, distance)};
        mine = mine < other ? other : mine;
    }
    return mine;
}

// A list from which one warp takes the best again and again. Entry i belongs to lane i % 32.
class Selection {
  public:
    // keys[num_entries]; unit_rows[i / 16]: the row of entry i is that plus i % 16.
    __device__ Selection(uint32_t* keys, const uint32_t* unit_rows, uint32_t num_entries)
        : keys_(keys), unit_rows_(unit_rows), num_entries_(num_entries) {
        find();
    }

    __device__ Candidate take() {
        const Candidate best = best_of_warp(best_);
        if (best.key != 0 && best.not_row == best_.not_row) {
            keys_[place_] = 0;
            find();
        }
        return best;
    }

  private:
    __device__ void find() {
        best_ = kNoCandidate;
        for (uint32_t i = threadIdx.x % 32; i < num_entries_; i += 32) {
            const Candidate candidate{keys_[i], ~(unit_rows_[i / 16] + i % 16)};
            if (candidate.key != 0 && best_ < candidate) {
                best_ = candidate;
                place_ = i;
            }
        }
    }

    uint32_t* keys_;
    const uint32_t* unit_rows_;
    uint32_t num_entries_, place_ = 0;
    Candidate best_;
};

// Merges sorted lists of other CTAs, [num_lists, length]; one warp.
class Merge {
  public:
    static constexpr int kMaxLists = 8 * 32;

    __device__ Merge(const uint2* lists, uint32_t num_lists, uint32_t length)
        : lists_(lists), num_lists_(num_lists), length_(length) {
#pragma unroll
        for (int i = 0; i < kMaxLists / 32; ++i) {
            taken_[i] = 0;
            head_[i] = load(i, 0);
        }
    }

    __device__ Candidate take() {
        Candidate mine = head_[0];
#pragma unroll
        for (int i = 1; i < kMaxLists / 32; ++i) {
            mine = mine < head_[i] ? head_[i] : mine;
        }
        const Candidate best = best_of_warp(mine);
#pragma unroll
        for (int i = 0; i < kMaxLists / 32; ++i) {
            if (best.key != 0 && head_[i].not_row == best.not_row) {
                head_[i] = load(i, ++taken_[i]);
            }
        }
        return best;
    }

  private:
    __device__ Candidate load(int i, uint32_t at) const {
        const uint32_t list = 32 * i + threadIdx.x % 32;
        if (list >= num_lists_ || at >= length_) {
            return kNoCandidate;
        }
        const uint2 words = ptx::load_l2(lists_ + list * length_ + at);
        return {words.x, words.y};
    }

    const uint2* lists_;
    uint32_t num_lists_, length_;
    uint32_t taken_[kMaxLists / 32];
    Candidate head_[kMaxLists / 32];
};

} // namespace fuseline
