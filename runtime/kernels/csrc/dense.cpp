// Products with weights as the file has them, [outputs, inputs]: nothing is packed, so that a weight can be an embedding's
// table as well.
//
// With AMX and bfloat16 the weight is the left matrix of a tile product and the rows of activations are columns, laid out
// for it once; a result is summed over the inputs, 32 at a time. Everywhere else 32 outputs become the lanes of two vectors,
// some inputs at a time, and all rows are multiplied with them; a result is summed over the inputs one after another, or
// pair after pair where a CPU multiplies pairs of bfloat16. Neither order depends on other rows or other outputs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "amx_dense.h"
#include "dot.h"
#include "products.h"

namespace quasar {
namespace {

constexpr int64_t ROWS = 256;   // of activations, at a time
constexpr int64_t CHUNK = 128;  // words of a weight's rows that are turned into lanes at a time

// A word is 32 bits: one input as float, or two as bfloat16. The first n of sixteen words, the others zero.
template <bool PAIRS, class T>
QUASAR_INLINE F words(const T* p, int n) {
  if constexpr (!PAIRS) return load(p, n);
  if (n >= LANES) return read<F>(p);
  F some = {};
  std::memcpy(&some, p, n * 4);
  return some;
}

// sum[n] + weight[n] * x, of the inputs of one word.
template <bool PAIRS>
QUASAR_INLINE F multiply_add(F weight, const float* x, F sum) {
  if constexpr (PAIRS) return dot_pairs(sum, weight, read<int32_t>(x));
  return fma(weight, splat(*x), sum);
}

// Words of up to 32 outputs [outputs, inputs] become [steps][32], zero where there is no output. `ahead` is asked for, as many
// bytes as are read: the same part of what comes next, but from end to end, as memory is fastest.
template <bool PAIRS, class T>
void turn(const T* weight, int64_t inputs, int64_t outputs, int64_t steps, const char* ahead, float* turned) {
  constexpr int EACH = PAIRS ? 2 : 1;
  for (int64_t n = 0; n < WIDE; n += LANES)
    for (int64_t s = 0; s < steps; s += LANES) {
      const int count = int(std::min<int64_t>(LANES, steps - s));
      F tile[LANES];
      for (int i = 0; i < LANES; ++i) {
        const T* from = weight + (n + i) * inputs + s * EACH;
        tile[i] = n + i < outputs ? words<PAIRS>(from, count) : F{};
        __builtin_prefetch(ahead, 0, 2), ahead += 64;
      }
      transpose(tile);
      for (int i = 0; i < count; ++i) store(turned + (s + i) * WIDE + n, tile[i]);
    }
}

// R rows of words, `stride` apart, times [steps][32]: added to y [R][32].
template <int R, bool PAIRS>
QUASAR_INLINE void multiply(const float* turned, const float* x, int64_t stride, int64_t steps, float* y) {
  F low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = load(y + r * WIDE), high[r] = load(y + r * WIDE + LANES);
  for (int64_t s = 0; s < steps; ++s) {
    const F a = load(turned + s * WIDE), b = load(turned + s * WIDE + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = multiply_add<PAIRS>(a, x + r * stride + s, low[r]);
      high[r] = multiply_add<PAIRS>(b, x + r * stride + s, high[r]);
    }
  }
  for (int r = 0; r < R; ++r) store(y + r * WIDE, low[r]), store(y + r * WIDE + LANES, high[r]);
}

template <bool PAIRS, class T, class Out>
void by_lanes(const T* x, const T* weight, int64_t rows, int64_t inputs, int64_t outputs, const Segments& segments, Out* out) {
  constexpr int EACH = PAIRS ? 2 : 1;
  const int64_t stride = spread((inputs + EACH - 1) / EACH * 4) / 4;
  std::vector<float> wide(rows * stride);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t s = 0; s * EACH < inputs; s += LANES)
      store(wide.data() + m * stride + s, words<PAIRS>(x + m * inputs + s * EACH, int(std::min(int64_t(LANES), inputs / EACH - s))));
  over_outputs(outputs, inputs * std::min(rows, ROWS), [&](int64_t begin, int64_t end) {
    alignas(64) float stack[Segments::DEPTH * ROWS * WIDE], turned[CHUNK * WIDE];
    for (int64_t m = 0; m < rows; m += ROWS)
      for (int64_t c = begin; c < end; ++c) {
        const int64_t count = std::min(ROWS, rows - m), first = c * WIDE, left = std::min(WIDE, outputs - first);
        segments.sum(stack, ROWS * WIDE, count * WIDE, [&](int64_t from, int64_t to, float* y) {
          for (int64_t k = from; k < to; k += CHUNK * EACH) {
            const int64_t steps = std::min(CHUNK, (to - k) / EACH);
            const auto* next = reinterpret_cast<const char*>(weight + (first + WIDE) * inputs + k * WIDE);
            turn<PAIRS>(weight + first * inputs + k, inputs, left, steps, next, turned);
            by_rows(count, [&]<int R>(int64_t r) {
              multiply<R, PAIRS>(turned, wide.data() + (m + r) * stride + k / EACH, stride, steps, y + r * WIDE);
            });
          }
        });
        for (int64_t r = 0; r < count; ++r)
          for (int64_t n = 0; n < left; n += LANES)
            store(out + (m + r) * outputs + first + n, load(stack + r * WIDE + n), int(std::min<int64_t>(LANES, left - n)));
      }
  });
}

}  // namespace

// x [M, K], weight [N, K] of one dtype, borders between segments of K -> [M, N] of `dtype`.
at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef borders, at::ScalarType dtype) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "a dense product takes contiguous tensors");
  const Segments segments(borders, inputs, 1);
  at::Tensor out = at::empty({rows, outputs}, x.options().dtype(dtype));
  if (rows == 0) return out;
  by_dtype(x.scalar_type(), [&](auto* type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    const auto *from = static_cast<const T*>(x.const_data_ptr()), *w = static_cast<const T*>(weight.const_data_ptr());
    by_dtype(dtype, [&](auto* out_type) {
      auto* to = static_cast<decltype(out_type)>(out.mutable_data_ptr());
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        if (amx::possible(segments)) return amx::by_tiles(from, w, rows, inputs, outputs, segments, to);
        if (HAS_PAIRS && segments.all_multiples_of(2))
          return by_lanes<HAS_PAIRS>(from, w, rows, inputs, outputs, segments, to);
      }
      by_lanes<false>(from, w, rows, inputs, outputs, segments, to);
    });
  });
  return out;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def("dense_linear(Tensor x, Tensor weight, int[] borders, ScalarType dtype) -> Tensor", &quasar::dense_linear);
}
