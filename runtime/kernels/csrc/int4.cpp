// Products with packed weights of four bits, by activations of eight bits or as they are.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "dot.h"
#include "packed.h"

namespace quasar {
namespace {

// Vectors of outputs in a tile of four bits. An activation goes to all lanes of a register, which on some processors takes turns
// with products, so one such load serves two of them.
constexpr int HALVES = TILE4 / LANES;

// One group of one tile for R rows: the exact sum of code times activation is added to sum[h][r].
template <int R>
QUASAR_INLINE void products(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, I (*sum)[R]) {
  constexpr int CHAINS = R <= 2 ? 2 : 1;  // sums side by side, as each waits for the one before
  I acc[CHAINS][HALVES][R] = {};
  for (int64_t s = 0; s < steps; ++s) {
    I low[HALVES], high[HALVES];
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
      const I w = read<I>(weight + (s * HALVES + h) * 64);
      ask(weight + (s * HALVES + h) * 64);
      low[h] = w & 0x0f0f0f0f, high[h] = (w >> 4) & 0x0f0f0f0f;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int32_t first = read<int32_t>(x + r * stride + s * 8), second = read<int32_t>(x + r * stride + s * 8 + 4);
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) acc[0][h][r] = dot<true>(acc[0][h][r], low[h], first);
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) acc[CHAINS - 1][h][r] = dot<true>(acc[CHAINS - 1][h][r], high[h], second);
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < HALVES; ++h)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[h][r] += CHAINS == 2 ? acc[0][h][r] + acc[CHAINS - 1][h][r] : acc[0][h][r];
}

// Half a tile's group with activations in float: sum[r] = the sum of (code - zero) * x, even and odd quads apart.
template <int R>
QUASAR_INLINE void products16(const uint8_t* weight, F zero, const float* x, int64_t stride, int64_t steps, F* sum) {
  F acc[2][R] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const I w = read<I>(weight + s * HALVES * 64);
    ask(weight + s * HALVES * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F low = nibble(w, 8 * i) - zero, high = nibble(w, 8 * i + 4) - zero;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        acc[0][r] = fma(low, splat(x[r * stride + s * 8 + i]), acc[0][r]);
        acc[1][r] = fma(high, splat(x[r * stride + s * 8 + 4 + i]), acc[1][r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) sum[r] = acc[0][r] + acc[1][r];
}

// Of one group, for R rows: total[r] += the exact sum of (code - zero) * activation, times both scales.
template <int R>
QUASAR_INLINE void finish(const I* sum, F scale, const float* x_scale, F* total) {
  for (int r = 0; r < R; ++r) total[r] = total[r] + to_float(sum[r]) * (splat(x_scale[r]) * scale);  // sums below 2^24
}

// R rows of activations from `row` on, in registers from group to group. A function of its own, as compilers run out of registers
// in large ones.
template <int R>
[[gnu::noinline]] void by_registers(const Codes& q, int64_t row, const Packed& w, int64_t tile, int64_t first, int64_t last,
                                    float* y) {
  const int64_t groups = w.inputs / w.group, bytes = w.group * TILE4 / 2, rows = q.rows;
  F total[HALVES][R] = {};
  for (int64_t g = first / w.group; g < last / w.group; ++g) {
    const int64_t at = tile * groups + g;
    I sum[HALVES][R];
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
      const I zero = w.zero_at(at * HALVES + h);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[h][r] = zero * splat(-q.sum[g * rows + row + r]);
    }
    products<R>(w.codes + at * bytes, q.at(row) + g * w.group, q.stride, w.group / 8, sum);
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h)
      finish<R>(sum[h], w.scale_at(at * HALVES + h), q.scale.data() + g * rows + row, total[h]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < HALVES; ++h)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(y + r * TILE4 + h * LANES, total[h][r]);
}

// One group of a tile as bytes of code - zero: [HALVES][group / 4][16][4].
QUASAR_INLINE void unpack(const Packed& w, int64_t line, I* to) {
  typedef int8_t S __attribute__((vector_size(64)));
  const uint8_t* weight = w.codes + line * w.group * LANES / 2;
  for (int h = 0; h < HALVES; ++h) {
    const S zero = bits<S>(w.zero_at(line + h) * 0x01010101);
    for (int64_t s = 0; s < w.group / 8; ++s, to += 2) {
      const uint8_t* from = weight + (s * HALVES + h) * 64;
      const I codes = read<I>(from);
      ask(from);
      to[0] = bits<I>(bits<S>(codes & 0x0f0f0f0f) - zero);
      to[1] = bits<I>(bits<S>((codes >> 4) & 0x0f0f0f0f) - zero);
    }
  }
}

// Rows of activations that AMX multiplies, from `row` on, a group after the other: added to y.
void by_amx(const Codes& q, int64_t row, int64_t count, const Packed& w, int64_t tile, int64_t first, int64_t last, int64_t step,
            float* y) {
  static thread_local std::vector<I> unpacked;
  unpacked.resize(w.group * TILE4 / sizeof(I));
  for (int64_t g = first / w.group; g < last / w.group; ++g) {
    const int64_t line = (tile * (w.inputs / w.group) + g) * HALVES;
    unpack(w, line, unpacked.data());
    const F scale[HALVES] = {w.scale_at(line), w.scale_at(line + 1)};
    for (int64_t r = 0; r < count; r += AMX_ROWS) {
      alignas(64) int32_t sums[HALVES * AMX_ROWS * LANES];
      amx_products(unpacked.data(), q.at(row + r) + g * w.group, q.stride, w.group, step, sums);
      const float* x_scale = q.scale.data() + g * q.rows + row + r;
      for (int64_t i = 0; i < std::min<int64_t>(AMX_ROWS, count - r); ++i)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
          float* to = y + (r + i) * TILE4 + h * LANES;
          const I sum = read<I>(sums + (h * AMX_ROWS + i) * LANES);
          F total = load(to);
          finish<1>(&sum, scale[h], x_scale + i, &total);
          store(to, total);
        }
    }
  }
}

void int4_by_int8(const Codes& q, const Packed& w, const Segments& segments, at::Tensor& out) {
  const int64_t step = amx_step(q.rows, w.group);
  over_tiles<TILE4>(out, w.inputs, step, [&](int64_t m, int64_t count, int64_t tile, float* stack) {
    const int64_t wide = step ? amx_rows(count) : 0;
    segments.sum(stack, STACK, count * TILE4, [&](int64_t first, int64_t last, float* y) {
      if (wide) by_amx(q, m, wide, w, tile, first, last, step, y);
      by_rows(count - wide, [&]<int R>(int64_t r) {
        by_registers<R>(q, m + wide + r, w, tile, first, last, y + (wide + r) * TILE4);
      });
    });
  });
}

// x: rows of floats, stride apart.
void int4_by_16bit(const float* x, int64_t stride, const Packed& w, const Segments& segments, at::Tensor& out) {
  const int64_t groups = w.inputs / w.group, bytes = w.group * TILE4 / 2;
  over_tiles<TILE4>(out, w.inputs, 0, [&](int64_t m, int64_t count, int64_t tile, float* stack) {
    segments.sum(stack, STACK, count * TILE4, [&](int64_t first, int64_t last, float* y) {
      for (int64_t g = first / w.group; g < last / w.group; ++g)
        for (int64_t h = 0; h < HALVES; ++h) {
          const int64_t at = tile * groups + g;
          const F own = w.scale_at(at * HALVES + h), middle = to_float(w.zero_at(at * HALVES + h));
          by_rows(count, [&]<int R>(int64_t r) {
            F sum[R];
            const uint8_t* codes = w.codes + at * bytes + h * 64;
            products16<R>(codes, middle, x + (m + r) * stride + g * w.group, stride, w.group / 8, sum);
            for (int i = 0; i < R; ++i) {
              float* to = y + (r + i) * TILE4 + h * LANES;
              store(to, fma(sum[i], own, load(to)));
            }
          });
        }
    });
  });
}

Packed packed(const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& zero, int64_t outputs,
              int64_t inputs, int64_t group) {
  const int64_t tiles = (outputs + TILE4 - 1) / TILE4;
  TORCH_CHECK(weight.nbytes() == size_t(tiles * inputs * TILE4 / 2), "the packing doesn't fit");
  TORCH_CHECK(scale.numel() * group == tiles * inputs * TILE4 && group % 8 == 0, "the scales don't fit");
  return {static_cast<const uint8_t*>(weight.const_data_ptr()), scale.const_data_ptr(), scale.scalar_type() == at::kBFloat16,
          zero ? static_cast<const uint8_t*>(zero->const_data_ptr()) : nullptr, inputs, group};
}

}  // namespace

// x [M, K] in groups, weight [tiles, K / 8, 32, 4], scale [tiles, K / group, 32] bfloat16 or float32, zero alike or absent.
at::Tensor int4_codes(const Codes& x, const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& zero,
                      int64_t outputs, at::IntArrayRef borders, at::ScalarType dtype) {
  at::Tensor out = at::empty({x.rows, outputs}, weight.options().dtype(dtype));
  int4_by_int8(x, packed(weight, scale, zero, outputs, x.inputs, x.group), Segments(borders, x.inputs, x.group), out);
  return out;
}

// x [M, K] as it is, the rest as above; eight: it is rounded.
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, int64_t outputs, int64_t group, bool eight,
                       at::IntArrayRef borders, at::ScalarType dtype) {
  TORCH_CHECK(x.is_contiguous(), "rows lie side by side");
  if (eight) return int4_codes(quantize(x, group), weight, scale, zero, outputs, borders, dtype);
  const int64_t rows = x.size(0), inputs = x.size(1);
  const Packed w = packed(weight, scale, zero, outputs, inputs, group);
  const Segments segments(borders, inputs, group);
  at::Tensor out = at::empty({rows, outputs}, x.options().dtype(dtype));
  const int64_t stride = spread(inputs * int64_t(sizeof(float))) / int64_t(sizeof(float));
  std::vector<float> wide(rows * stride);
  by_dtype(x.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(x.data_ptr());
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < inputs; k += LANES) {
        const int n = int(std::min<int64_t>(LANES, inputs - k));
        store(wide.data() + m * stride + k, load(from + m * inputs + k, n), n);
      }
  });
  int4_by_16bit(wide.data(), stride, w, segments, out);
  return out;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "int4_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, int outputs, int group, bool eight, int[] borders, "
      "ScalarType dtype) -> Tensor",
      &quasar::int4_linear);
}
