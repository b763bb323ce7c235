// AMX under names of its own: eight tiles of 16 rows of 64 bytes, and products of tiles of bytes or of bf16.
//
// FUSELINE_EMULATE_TILES compiles the kernels that are made of them for any CPU, to test them where AMX is missing.
// What they do is in Intel's Software Developer's Manual, volume 2, at LDTILECFG, TILELOADD, TDPBSSD, TDPBF16PS and
// TILESTORED.
#pragma once

#include "isa.h"

#if defined(FUSELINE_EMULATE_TILES) || defined(__AMX_INT8__)
#define FUSELINE_TILES 1
#endif

#ifdef FUSELINE_TILES
#if !defined(FUSELINE_EMULATE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fuseline {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

#if defined(FUSELINE_EMULATE_TILES)

inline uint8_t (&tile(int index)) [kTileRows * kTileBytes] {
    static thread_local uint8_t tiles[8][kTileRows * kTileBytes];
    return tiles[index];
}

// Tiles for this thread, until it releases them.
class Tiles {
  public:
    static bool usable() { return true; }
    ~Tiles() {
        for (int index = 0; index < 8; ++index)
            std::memset(tile(index), 0xab, sizeof tile(index)); // what is used without a configuration shows
    }

    template <int Index>
    void zero() {
        std::memset(tile(Index), 0, sizeof tile(Index));
    }
    template <int Index>
    void load(const void* from, int64_t stride) {
        for (int64_t row = 0; row < kTileRows; ++row)
            std::memcpy(tile(Index) + row * kTileBytes, static_cast<const char*>(from) + row * stride, kTileBytes);
    }
    template <int Index>
    void store(void* to, int64_t stride) {
        for (int64_t row = 0; row < kTileRows; ++row)
            std::memcpy(static_cast<char*>(to) + row * stride, tile(Index) + row * kTileBytes, kTileBytes);
    }
    // sum[i][j] += a[i][4 k + l] b[k][4 j + l] over k and l; signed bytes into 32-bit integers.
    template <int Sum, int A, int B>
    void multiply() {
        for (int64_t row = 0; row < kTileRows; ++row) {
            int32_t sums[kTileRows];
            std::memcpy(sums, tile(Sum) + row * kTileBytes, sizeof sums);
            for (int64_t k = 0; k < kTileBytes; ++k) {
                const auto* b = reinterpret_cast<const int8_t*>(tile(B)) + k / 4 * kTileBytes + k % 4;
                for (int64_t col = 0; col < kTileRows; ++col)
                    sums[col] += int32_t(int8_t(tile(A)[row * kTileBytes + k])) * b[4 * col];
            }
            std::memcpy(tile(Sum) + row * kTileBytes, sums, sizeof sums);
        }
    }
    // The same for floats of 16 bits into floats: sum[i][j] += a[i][2 k + l] b[k][2 j + l].
    template <int Sum, int A, int B>
    void multiply_bf16() {
        for (int64_t row = 0; row < kTileRows; ++row) {
            float sums[kTileRows];
            std::memcpy(sums, tile(Sum) + row * kTileBytes, sizeof sums);
            const auto* a = reinterpret_cast<const bf16*>(tile(A) + row * kTileBytes);
            for (int64_t k = 0; k < kTileBytes / 2; ++k) {
                const auto* b = reinterpret_cast<const bf16*>(tile(B) + k / 2 * kTileBytes) + k % 2;
                for (int64_t col = 0; col < kTileRows; ++col)
                    sums[col] += widen(a[k]) * widen(b[2 * col]);
            }
            std::memcpy(tile(Sum) + row * kTileBytes, sums, sizeof sums);
        }
    }
};

#else

class Tiles {
  public:
    // Whether the system lets this process have tiles; asked for once.
    static bool usable() {
        static const bool granted = [] {
            constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
            return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
        }();
        return granted;
    }

    Tiles() {
        alignas(64) uint8_t config[64] = {1}; // palette 1
        for (int index = 0; index < 8; ++index) {
            config[16 + 2 * index] = kTileBytes;
            config[48 + index] = kTileRows;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int Index>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(Index));
    }
    template <int Index>
    void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0, %1, 1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Index) : "memory");
    }
    template <int Index>
    void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0, %1, 1)" ::"r"(to), "r"(stride), "i"(Index) : "memory");
    }
    template <int Sum, int A, int B>
    void multiply() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
    }
    template <int Sum, int A, int B>
    void multiply_bf16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
    }
};

#endif

} // namespace fuseline
#endif
