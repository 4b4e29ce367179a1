// What products have in common: how they ask for weights, rows in registers, and sums over segments of the inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "simd.h"
#include "team.h"

namespace quasar {

constexpr int MICRO = 8;             // rows of activations in registers
constexpr int64_t WIDE = 2 * LANES;  // outputs of a dense product at a time

// Asks for a packed weight some KiB before it is needed. It is read once a pass: AMD's cores bring it past the outer caches, which
// so keep what comes again, the KV cache and the interpreter. Intel's then have fewer requests under way, and take twice as long.
QUASAR_INLINE void ask(const uint8_t* weight) {
  if constexpr (AMD) __builtin_prefetch(weight + 8192, 0, 0);
  else __builtin_prefetch(weight + 4096, 0, 1);
}

// Calls f.template operator()<R>(first row) for R rows at a time.
template <class Function>
QUASAR_INLINE void by_rows(int64_t rows, const Function& f) {
  int64_t r = 0;
  for (; r + MICRO <= rows; r += MICRO) f.template operator()<MICRO>(r);
  switch (rows - r) {
    case 7: return f.template operator()<7>(r);
    case 6: return f.template operator()<6>(r);
    case 5: return f.template operator()<5>(r);
    case 4: return f.template operator()<4>(r);
    case 3: return f.template operator()<3>(r);
    case 2: return f.template operator()<2>(r);
    case 1: return f.template operator()<1>(r);
  }
}

// Bytes between rows of this length: whole vectors, and an odd number of cache lines, so that rows that are read side by
// side don't fall into the same sets of the cache.
inline int64_t spread(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// Threads share a dense product's outputs: f(begin, end) in units of 32; work: of each output.
template <class Function>
void over_outputs(int64_t outputs, int64_t work, const Function& f) {
  parallel_for((outputs + WIDE - 1) / WIDE, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work * WIDE)), f);
}

// Segments of the inputs, at most eight, whose sums are added as a binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
//
// A stack holds the trees that are complete, one for every bit that is set in the number of segments summed so far.
class Segments {
 public:
  static constexpr int DEPTH = 4;

  // inner: the borders between segments, in order; each a multiple of `unit`.
  Segments(c10::IntArrayRef inner, int64_t inputs, int64_t unit) : edges_(inner.size() + 2) {
    TORCH_CHECK(inner.size() < 8, "a product has at most eight segments");
    std::copy(inner.begin(), inner.end(), edges_.begin() + 1);
    edges_.back() = inputs;
    for (size_t s = 0; s + 1 < edges_.size(); ++s)
      TORCH_CHECK(edges_[s] <= edges_[s + 1] && edges_[s] % unit == 0, "segments are in order and of whole units");
  }

  // f(first input, last, sums) adds to `size` floats, zero at first. The total is in stack[0..size); levels of the stack
  // lie `stride` apart.
  template <class Function>
  QUASAR_INLINE void sum(float* stack, int64_t stride, int64_t size, const Function& f) const {
    const uint64_t count = edges_.size() - 1;
    for (uint64_t s = 0; s < count; ++s) {
      float* sums = stack + std::popcount(s) * stride;
      std::memset(sums, 0, sizeof(float) * size);
      f(edges_[s], edges_[s + 1], sums);
      for (int trees = s + 1 == count ? std::popcount(s) : std::countr_one(s); trees; --trees, sums -= stride)
        for (int64_t i = 0; i < size; i += LANES) store(sums - stride + i, load(sums - stride + i) + load(sums + i));
    }
  }

  bool all_multiples_of(int64_t unit) const {
    for (int64_t edge : edges_)
      if (edge % unit) return false;
    return true;
  }

 private:
  std::vector<int64_t> edges_;  // the first is 0
};

}  // namespace quasar
