// What paged attention does with a piece of 64 keys: scores, weights, and values blended by these.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dot.h"
#include "pieces.h"

namespace quasar {

struct Scratch {
  std::vector<float> query, keys, values, weights, out, top, total, fade;
  std::vector<const float*> q;
  std::vector<float*> w, y;
  std::vector<int> low, high;
};

// Whether queries and keys are multiplied in pairs; queries then lie in pairs as well. In the time of a vector of pairs Intel's
// cores multiply four of single numbers.
template <class C>
constexpr bool in_pairs = HAS_PAIRS && AMD && std::is_same_v<C, c10::BFloat16>;

// weights[r][0..16 V) = query[r] . keys, turned, times their steps.
template <int R, int V, class C>
QUASAR_INLINE void scores(const float* const* query, const float* turned, const float* step, int64_t padded,
                          float* const* weights, int at) {
  constexpr int PER = 4 / sizeof(C);
  F acc[R][V] = {};
  for (int64_t u = 0; u < padded / PER; ++u) {
    F unit[V];
    for (int v = 0; v < V; ++v) unit[v] = load(turned + u * PIECE + at + v * LANES);
    if constexpr (in_pairs<C>) {
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = dot_pairs(acc[r][v], unit[v], read<int32_t>(query[r] + u));
      continue;
    }
#pragma GCC unroll 4
    for (int e = 0; e < PER; ++e) {
      F k[V];
      for (int v = 0; v < V; ++v) {
        k[v] = part_of<C>(bits<U>(unit[v]), e);
        if constexpr (is_eight<C>) k[v] = k[v] * load(step + at + v * LANES);
      }
      for (int r = 0; r < R; ++r) {
        const F q = splat(query[r][u * PER + e]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(q, k[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(weights[r] + at + v * LANES, acc[r][v]);
}

// Of vectors of keys first..last.
template <int R, class C>
void scores_of(const float* const* query, const float* turned, const float* step, int64_t padded, float* const* weights,
               int first, int last) {
  if (last - first + 1 == VECS) return scores<R, VECS, C>(query, turned, step, padded, weights, 0);
  for (int v = first; v <= last; ++v) scores<R, 1, C>(query, turned, step, padded, weights, v * LANES);
}

// out[r] = out[r] * fade[r] + weights[r] . values, over the keys low..high, for V vectors of the dimension from d on.
template <int R, int V, class C>
QUASAR_INLINE void blend(float* const* weights, const C* const* values, const float* step, int64_t d, int low, int high,
                         float* const* out, const float* fade) {
  F acc[R][V] = {};
  for (int j = low; j <= high; ++j) {
    F x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = load(values[j] + d + v * LANES);
      if constexpr (is_eight<C>) x[v] = x[v] * splat(step[j]);
    }
    for (int r = 0; r < R; ++r) {
      const F w = splat(weights[r][j]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* y = out[r] + d + v * LANES;
      store(y, fma(load(y), splat(fade[r]), acc[r][v]));
    }
}

template <int R, class C>
void blend_all(float* const* weights, const C* const* values, const float* step, int64_t padded, int low, int high,
               float* const* out, const float* fade) {
  constexpr int V = R <= 2 ? 8 : 4;  // sums side by side: enough to keep multipliers busy, few enough for registers
  int64_t d = 0;
  for (; d + V * LANES <= padded; d += V * LANES) blend<R, V>(weights, values, step, d, low, high, out, fade);
  for (; d < padded; d += LANES) blend<R, 1>(weights, values, step, d, low, high, out, fade);
}

// Rows go together where they see the same keys; what a row doesn't see isn't touched, be it NaN.
template <class C>
void blend_rows(const Shape& s, int64_t active, const C* const* values, const float* step, Scratch& m) {
  for (int64_t a = 0; a < active;) {
    const int low = m.low[a], high = m.high[a];
    int64_t same = 1;
    while (same < 4 && a + same < active && m.low[a + same] == low && m.high[a + same] == high) ++same;
    if (same == 4)
      blend_all<4>(&m.w[a], values, step, s.padded, low, high, &m.y[a], &m.fade[a]);
    else if (same >= 2)
      blend_all<2>(&m.w[a], values, step, s.padded, low, high, &m.y[a], &m.fade[a]), same = 2;
    else
      blend_all<1>(&m.w[a], values, step, s.padded, low, high, &m.y[a], &m.fade[a]);
    a += same;
  }
}

// Scores become weights, and what is summed so far gets its factor.
inline void soften(const Shape& s, int64_t a, Scratch& m) {
  const int64_t c = (m.w[a] - m.weights.data()) / PIECE;
  F x[VECS], top = splat(-INFINITY);
  for (int v = 0; v < VECS; ++v) {
    const I lane = I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int32_t(v * LANES);
    x[v] = load(m.w[a] + v * LANES) * splat(s.scale);
    if (s.cap > 0) x[v] = splat(s.cap) * tanh(x[v] / splat(s.cap));
    x[v] = (lane >= m.low[a]) & (lane <= m.high[a]) ? x[v] : splat(-INFINITY);
    top = max(top, x[v]);
  }
  const float old = m.top[c], now = std::max(old, max(top));
  F part = {};
  for (int v = 0; v < VECS; ++v) {
    x[v] = exp(x[v] - splat(now));
    part = part + x[v];
    store(m.w[a] + v * LANES, x[v]);
  }
  m.fade[a] = exp(old - now);
  m.total[c] = m.total[c] * m.fade[a] + sum(part);
  m.top[c] = now;
}

}  // namespace quasar
