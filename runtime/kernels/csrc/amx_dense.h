// Products with bfloat16 weights [outputs, inputs] by AMX: `dense.cpp` says how they are added.
#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"
#include "products.h"

namespace quasar::amx {

typedef c10::BFloat16 T;
constexpr int64_t STEP = 32;  // inputs of a tile

#if defined(QUASAR_AMX_BF16)

// Two tiles of outputs by one or two of rows, over `width` inputs: sums [2][ROW][16 outputs][16 rows]. Asks for `next`
// meanwhile.
template <int ROW>
void products(const T* weight, int64_t inputs, int64_t width, const T* x, const char* next, float* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (ROW == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const int64_t stride = inputs * int64_t(sizeof(T)), block = inputs * AMX_ROWS;
  for (int64_t k = 0; k < width; k += STEP) {
    if (next)
      for (int i = 0; i < 32; ++i) __builtin_prefetch(next + k * 64 + i * 64, 0, 2);
    _tile_loadd(4, weight + k, stride);
    _tile_loadd(5, weight + block + k, stride);
    _tile_loadd(6, x + k * AMX_ROWS, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (ROW == 2) {
      _tile_loadd(7, x + block + k * AMX_ROWS, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + ROW * 256, 64);
  if constexpr (ROW == 2) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// Sixteen rows side by side, pairs of inputs together: [blocks][K / 2][16][2], zero where there is no row.
std::vector<T> columns(const T* x, int64_t rows, int64_t inputs) {
  std::vector<T> laid((rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS * inputs);
  for (int64_t m = 0; m < rows; ++m) {
    T* to = laid.data() + m / AMX_ROWS * AMX_ROWS * inputs + m % AMX_ROWS * 2;
    for (int64_t k = 0; k < inputs; k += 2) std::memcpy(to + k * AMX_ROWS, x + m * inputs + k, 2 * sizeof(T));
  }
  return laid;
}

// The outputs first..first + 32 of all rows; `weight` begins with the first.
template <class Out>
void outputs_of(const T* weight, const T* x, int64_t rows, int64_t inputs, const Segments& segments, int64_t first,
                int64_t outputs, const char* next, Out* out) {
  alignas(64) float sums[Segments::DEPTH * 1024];
  for (int64_t m = 0; m < rows; m += 2 * AMX_ROWS) {
    const int blocks = m + AMX_ROWS < rows ? 2 : 1;
    segments.sum(sums, 1024, blocks * 512, [&](int64_t from, int64_t to, float* part) {
      const T* at = x + m * inputs + from * AMX_ROWS;
      const char* ahead = next && m == 0 ? next + from * 64 : nullptr;
      if (blocks == 2) products<2>(weight + from, inputs, to - from, at, ahead, part);
      else products<1>(weight + from, inputs, to - from, at, ahead, part);
    });
    for (int o = 0; o < 2; ++o)
      for (int b = 0; b < blocks; ++b) {
        F tile[LANES];
        for (int i = 0; i < LANES; ++i) tile[i] = load(sums + (o * blocks + b) * 256 + i * LANES);
        transpose(tile);
        const int64_t n = first + o * LANES, row = m + b * AMX_ROWS;
        if (n >= outputs) continue;
        const int width = int(std::min<int64_t>(LANES, outputs - n));
        for (int64_t i = 0; i < std::min<int64_t>(LANES, rows - row); ++i) store(out + (row + i) * outputs + n, tile[i], width);
      }
  }
}

template <class Out>
void by_tiles(const T* x, const T* weight, int64_t rows, int64_t inputs, int64_t outputs, const Segments& segments, Out* out) {
  const std::vector<T> laid = columns(x, rows, inputs);
  over_outputs(outputs, inputs, [&](int64_t begin, int64_t end) {
    AmxTiles tiles;
    std::vector<T> last;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * WIDE, left = outputs - first;
      const T* from = weight + first * inputs;
      const char* next = c + 1 < end && left >= 2 * WIDE ? reinterpret_cast<const char*>(from + WIDE * inputs) : nullptr;
      if (left < WIDE) {  // with zeros behind the last output
        last.resize(WIDE * inputs);
        std::memcpy(last.data(), from, left * inputs * sizeof(T));
        from = last.data();
      }
      outputs_of(from, laid.data(), rows, inputs, segments, first, outputs, next, out);
    }
  });
}

inline bool possible(const Segments& segments) { return segments.all_multiples_of(STEP) && amx_allowed(); }

#else

inline bool possible(const Segments&) { return false; }
template <class Out>
void by_tiles(const T*, const T*, int64_t, int64_t, int64_t, const Segments&, Out*) {}

#endif

}  // namespace quasar::amx
