// Intel's matrix unit (AMX) in a few functions, for screen.inc: eight tiles of 16 rows of 64 bytes. DTC_SCREEN = 3
// computes them in plain C++, so that the code around them runs on any CPU; only tests ask for that.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deltatc {

constexpr int kAmx = 2, kAmxModel = 3;  // of DTC_SCREEN

// Whether the CPU has the unit for bytes, and Linux gives its registers to this process, which has to ask.
inline bool amx_available() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, features = 0;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  constexpr int kRequest = 0x1023, kTileData = 18;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
  return (features & kTiles) && (features & kBytes) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

#if defined(__x86_64__)
namespace amx {

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define DTC_AMX_TARGET __attribute__((target("amx-tile,amx-int8"))) inline __attribute__((always_inline))

DTC_AMX_TARGET void tiles_begin() {
  static const Config config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
DTC_AMX_TARGET void tiles_end() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
DTC_AMX_TARGET void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
DTC_AMX_TARGET void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
DTC_AMX_TARGET void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sums += a (signed bytes) @ b (unsigned bytes): 16 x 16 sums in 32 bits, of a's rows and b's columns of four bytes
template <int kSums, int kA, int kB>
DTC_AMX_TARGET void tile_multiply() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

}  // namespace amx
#endif

namespace amx_model {

inline uint8_t (&tile(int number))[16][64] {
  static thread_local uint8_t tiles[8][16][64];
  return tiles[number];
}
inline void tiles_begin() {
  for (int i = 0; i < 8; ++i) std::memset(tile(i), 0, sizeof(tile(i)));
}
inline void tiles_end() { tiles_begin(); }
template <int kTile>
void tile_zero() {
  std::memset(tile(kTile), 0, sizeof(tile(kTile)));
}
template <int kTile>
void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tile(kTile)[row], static_cast<const char*>(from) + row * stride, 64);
}
template <int kTile>
void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tile(kTile)[row], 64);
}
template <int kSums, int kA, int kB>
void tile_multiply() {
  for (int row = 0; row < 16; ++row) {
    int32_t sums[16];
    std::memcpy(sums, tile(kSums)[row], 64);
    for (int column = 0; column < 16; ++column) {
      for (int step = 0; step < 64; ++step) {
        const int a = static_cast<int8_t>(tile(kA)[row][step]), b = tile(kB)[step / 4][4 * column + step % 4];
        sums[column] += a * b;
      }
    }
    std::memcpy(tile(kSums)[row], sums, 64);
  }
}

}  // namespace amx_model

}  // namespace deltatc
