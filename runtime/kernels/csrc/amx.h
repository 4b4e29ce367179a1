// Integer products of sixteen rows at a time on CPUs that have AMX: exact, so the same bits as the other ways.
#pragma once

#include "products.h"

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
constexpr int AMX_FROM = 9;  // rows that are faster as a tile of sixteen than one by one

// Whether the last of these rows, which fill no tile, are multiplied as one.
inline bool fills_tile(int64_t rows) { return rows % AMX_ROWS >= AMX_FROM; }

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
  // 0..3: sums, 4: activations in steps of 32 or 64 inputs of a byte, 5..7: weights.
  explicit AmxTiles(int64_t step) {
    asm volatile("sttilecfg %0" : "=m"(before_));  // in GCC's own words it touches eight bytes, and the others may be dropped
    alignas(64) unsigned char config[64] = {};
    config[0] = 1;
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = t == 4 ? (unsigned char)step : 64;
      config[48 + t] = t >= 5 ? (unsigned char)(step / 4) : AMX_ROWS;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() {
    if (before_[0]) {
      asm volatile("ldtilecfg %0" ::"m"(before_));
    } else {
      _tile_release();
    }
  }
  AmxTiles(const AmxTiles&) = delete;

 private:
  alignas(64) unsigned char before_[64];
};

// sum [2][16][16]: sixteen rows of activations times one group of both halves of a tile [2][group / 4][16][4], of signed bytes.
inline void amx_products(const I* weight, const int8_t* x, int64_t stride, int64_t group, int64_t step, int32_t* sum) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < group; k += step) {
    _tile_loadd(4, x + k, stride);
    _tile_loadd(5, weight + k / 4, 64);
    _tile_loadd(6, weight + (group + k) / 4, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 6);
  }
  _tile_stored(0, sum, 64);
  _tile_stored(1, sum + AMX_ROWS * LANES, 64);
}

// sum [16][16]: sixteen rows of activations times all of a tile [inputs / 4][16][4] of unsigned bytes, the first of them or more.
inline void amx_products8(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t inputs, int64_t step, bool first,
                          int32_t* sum) {
  _tile_zero(0);
  for (int64_t k = 0; k < inputs; k += step) {
    if (first)
      for (int64_t i = 0; i < step * LANES; i += 64) ask(weight + k * LANES + i);
    _tile_loadd(4, x + k, stride);
    _tile_loadd(5, weight + k * LANES, 64);
    _tile_dpbsud(0, 4, 5);
  }
  _tile_stored(0, sum, 64);
}

#else

inline bool amx_allowed() { return false; }
struct AmxTiles {
  explicit AmxTiles(int64_t) {}
};
inline void amx_products(const I*, const int8_t*, int64_t, int64_t, int64_t, int32_t*) {}
inline void amx_products8(const uint8_t*, const int8_t*, int64_t, int64_t, int64_t, bool, int32_t*) {}

#endif

}  // namespace quasar
