// Keys and values of paged attention, a piece of 64 at a time: where they lie, keys turned, values as floats.
#pragma once

#include <algorithm>

#include "rows.h"
#include "simd.h"

namespace quasar {

constexpr int PIECE = 64;  // keys
constexpr int VECS = PIECE / LANES;

struct Shape {
  int64_t heads, kv_heads, dim, padded, block, max_blocks, blocks;
  float scale, cap;
  int64_t window;
};

// Where a piece's keys and values lie, by their number in it, and the first of the next piece's.
template <class C>
struct Piece {
  const C *key[PIECE + LANES], *value[PIECE + LANES];  // null: not in a block that is there, or after the last
  float key_step[PIECE + LANES], value_step[PIECE];
};

// Finds a piece's keys from `base + low` to `last`.
template <class C>
void find(const Shape& s, const int32_t* table, int64_t base, int low, int64_t last, int64_t kv, const C* key_cache,
          const C* value_cache, Piece<C>& piece) {
  const int64_t width = row_width<C>(s.dim), end = std::min<int64_t>(PIECE + LANES, last - base + 1);
  std::fill(piece.key, piece.key + PIECE + LANES, nullptr);
  std::fill(piece.value, piece.value + PIECE + LANES, nullptr);
  int64_t number = (base + low) / s.block, within = (base + low) % s.block;
  for (int64_t j = low; j < end; ++number, within = 0) {
    const int64_t block = table[number], run = std::min(end, j + s.block - within);
    int64_t at = ((block * s.kv_heads + kv) * s.block + within) * width;
    for (; j < run; ++j, at += width) {
      if (block < 0 || block >= s.blocks) continue;
      piece.key[j] = key_cache + at;
      piece.value[j] = value_cache + at;
      if constexpr (is_eight<C>)
        if (j < PIECE) {
          piece.key_step[j] = scale_of(key_cache + at, s.dim);
          piece.value_step[j] = scale_of(value_cache + at, s.dim);
        }
    }
  }
}

// Keys low..high and what is in their vectors of sixteen, in four bytes each, as [D * sizeof(C) / 4][64]; zero where there are
// none. Sixteen rows fill what a core can have under way of memory: so while some are turned, the next are asked for.
template <class C>
void turn_keys(const Shape& s, int low, int high, const Piece<C>& piece, float* turned) {
  const int64_t bytes = s.dim * int64_t(sizeof(C)), units = s.padded * int64_t(sizeof(C)) / 4;
  for (int first = low / LANES * LANES; first <= high; first += LANES) {
    for (int j = first; j < first + LANES; ++j)
      for (int64_t d = 0; d < bytes; d += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(piece.key[j + LANES]) + d);
        __builtin_prefetch(reinterpret_cast<const char*>(piece.value[j]) + d);
      }
    const char* key[LANES];
    bool whole = true;
    for (int i = 0; i < LANES; ++i) {
      key[i] = first + i <= high ? reinterpret_cast<const char*>(piece.key[first + i]) : nullptr;
      whole = whole && key[i];
    }
    for (int64_t u = 0; u < units; u += LANES) {
      const int64_t rest = bytes - 4 * u;
      F x[LANES];
      if (whole && rest >= 64) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) x[i] = read<F>(key[i] + 4 * u);
      } else {
        for (int i = 0; i < LANES; ++i) x[i] = key[i] ? read_bytes(key[i] + 4 * u, rest) : F{};
      }
      transpose(x);
      float* to = turned + u * PIECE + first;
      if (units - u >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(to + i * PIECE, x[i]);
      } else {
        for (int i = 0; i < units - u; ++i) store(to + i * PIECE, x[i]);
      }
    }
  }
}

// Values low..high as floats, each with its step.
template <class C>
void widen_values(const Shape& s, int low, int high, const Piece<C>& piece, float* const* values) {
  for (int j = low; j <= high; ++j)
    for (int64_t d = 0; piece.value[j] && d < s.dim; d += LANES) {
      const F x = load(piece.value[j] + d, int(std::min<int64_t>(LANES, s.dim - d)));
      store(values[j] + d, is_eight<C> ? x * splat(piece.value_step[j]) : x);
    }
}

}  // namespace quasar
