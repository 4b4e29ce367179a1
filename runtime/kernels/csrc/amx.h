// Integer products of sixteen rows at a time on CPUs that have AMX: exact, so the same bits as the other ways.
#pragma once

#include "dot.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define QUASAR_AMX 1
#if defined(__AMX_BF16__)
#define QUASAR_AMX_BF16 1
#endif
#endif

namespace quasar {

constexpr int AMX_ROWS = 16;

#if defined(QUASAR_AMX)

// Linux wants to be asked, once per process, for the registers' room.
inline bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// Shapes this thread's tile registers, and gives them back as they were.
class AmxTiles {
 public:
  // All of sixteen rows and 64 bytes.
  AmxTiles() : AmxTiles(64) {}
  // 0..3: sums, 4: activations in steps of 32 or 64 inputs of a byte, 5: weights.
  explicit AmxTiles(int64_t step) {
    _tile_storeconfig(before_);
    alignas(64) unsigned char config[64] = {};
    config[0] = 1;
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = t == 4 ? (unsigned char)step : 64;
      config[48 + t] = t == 5 ? (unsigned char)(step / 4) : AMX_ROWS;
    }
    _tile_loadconfig(config);
  }
  ~AmxTiles() {
    if (before_[0]) {
      _tile_loadconfig(before_);
    } else {
      _tile_release();
    }
  }
  AmxTiles(const AmxTiles&) = delete;

 private:
  alignas(64) unsigned char before_[64];
};

// Four-bit codes of one group of half a tile, `apart` bytes from step to step, as bytes: [group / 4][16][4].
inline void amx_unpack(const uint8_t* weight, int64_t apart, int64_t steps, uint8_t* to) {
  for (int64_t s = 0; s < steps; ++s) {
    const I w = read<I>(weight + s * apart);
    __builtin_prefetch(weight + s * apart + 2048);
    const I low = w & 0x0f0f0f0f, high = (w >> 4) & 0x0f0f0f0f;
    std::memcpy(to + s * 128, &low, 64);
    std::memcpy(to + s * 128 + 64, &high, 64);
  }
}

// sum [16 or 64][16]: rows of activations times one group of a tile.
template <int TILES>
inline void amx_products(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t group, int64_t step, int32_t* sum) {
  static_assert(TILES == 1 || TILES == 4);
  _tile_zero(0);
  if constexpr (TILES == 4) {
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < group; k += step) {
    _tile_loadd(5, weight + k * LANES, 64);
    _tile_loadd(4, x + k, stride);
    _tile_dpbsud(0, 4, 5);
    if constexpr (TILES == 4) {
      _tile_loadd(4, x + 16 * stride + k, stride);
      _tile_dpbsud(1, 4, 5);
      _tile_loadd(4, x + 32 * stride + k, stride);
      _tile_dpbsud(2, 4, 5);
      _tile_loadd(4, x + 48 * stride + k, stride);
      _tile_dpbsud(3, 4, 5);
    }
  }
  _tile_stored(0, sum, 64);
  if constexpr (TILES == 4) {
    _tile_stored(1, sum + 256, 64);
    _tile_stored(2, sum + 512, 64);
    _tile_stored(3, sum + 768, 64);
  }
}

#else

inline bool amx_allowed() { return false; }
struct AmxTiles {
  explicit AmxTiles(int64_t) {}
};
inline void amx_unpack(const uint8_t*, int64_t, int64_t, uint8_t*) {}
template <int TILES>
inline void amx_products(const uint8_t*, const int8_t*, int64_t, int64_t, int64_t, int32_t*) {}

#endif

}  // namespace quasar
