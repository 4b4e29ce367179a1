// Products with packed weights of four and eight bits.
//
// Sixteen outputs of eight bits make a tile, or thirty-two of four. Its weights lie in the order in which the inputs come: 64
// bytes are sixteen outputs by four inputs (one int32 lane each), and of four-bit weights the low halves are the first four
// inputs of eight, the high halves the next four, of one half of the tile and then of the other. A tile's weights are read once
// for every 64 rows of activations.
//
// Integer sums are exact, and what follows them is multiplied and added one rounding at a time (nothing is fused), so
// every instruction set gives the same bits; `runtime/kernels/reference.py` says which.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "amx.h"
#include "products.h"

namespace quasar {
namespace {

constexpr int ROWS = 64;   // of activations, at a time
// Vectors of outputs in a tile of four bits. An activation goes to all lanes of a register, which on some processors takes turns
// with products, so one such load serves two of them.
constexpr int HALVES = TILE4 / LANES;
constexpr int64_t STACK = ROWS * TILE4;
// Bytes a weight is asked for before it is needed. It is read once a pass: not by way of the outer caches, so that these keep
// what comes again, the KV cache and the interpreter.
constexpr int64_t AHEAD = 8192;

struct Codes {
  std::vector<int8_t> code;   // [M, K]
  std::vector<float> scale;   // [groups, M]
  std::vector<int32_t> sum;   // [groups, M]
  int64_t rows, stride;       // M; of a row of codes
};

// Rounds rows of activations to signed bytes, each group with a scale of its own.
template <class T>
Codes quantize(const T* x, int64_t rows, int64_t inputs, int64_t group) {
  Codes q;
  const int64_t groups = group ? inputs / group : 0;
  q.rows = rows, q.stride = spread(inputs);
  q.code.resize(rows * q.stride);
  q.scale.resize(rows * groups);
  q.sum.resize(rows * groups);
  parallel_for(rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(inputs, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t g = 0; g < groups; ++g) {
        const T* from = x + m * inputs + g * group;
        int8_t* to = q.code.data() + m * q.stride + g * group;
        const Rounding how = Rounding::of(from, group, 127.0f);
        I total = {};
        for (int64_t k = 0; k < group; k += LANES) {
          const int n = int(std::min<int64_t>(LANES, group - k));
          const I c = how.some ? round_to_int(load(from + k, n) * how.inverse) : I{};
          total += c;
          const B b = narrow(c);
          std::memcpy(to + k, &b, n);
        }
        q.sum[g * rows + m] = sum(total);
        q.scale[g * rows + m] = how.scale;
      }
  });
  return q;
}

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
      __builtin_prefetch(weight + (s * HALVES + h) * 64 + AHEAD, 0, 0);
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

// All of one tile of eight bits for R rows.
template <int R>
QUASAR_INLINE void products8(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, I* sum) {
  for (int64_t s = 0; s < steps; ++s) {
    const I w = read<I>(weight + s * 64);
    __builtin_prefetch(weight + s * 64 + AHEAD, 0, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = dot<false>(sum[r], w, read<int32_t>(x + r * stride + s * 4));
  }
}

// Half a tile's group with activations in float: sum[r] = the sum of (code - zero) * x, even and odd quads apart.
template <int R>
QUASAR_INLINE void products16(const uint8_t* weight, F zero, const float* x, int64_t stride, int64_t steps, F* sum) {
  F acc[2][R] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const I w = read<I>(weight + s * HALVES * 64);
    __builtin_prefetch(weight + s * HALVES * 64 + AHEAD, 0, 0);
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

// A product with a packed weight: what its kernel needs besides the activations.
struct Packed {
  const uint8_t* codes;
  const void* scale;  // bfloat16 or float
  bool narrow;
  const uint8_t* zero;  // or null: 8 throughout
  int64_t inputs, group;

  F scale_at(int64_t line) const {
    return narrow ? load(static_cast<const c10::BFloat16*>(scale) + line * LANES)
                  : load(static_cast<const float*>(scale) + line * LANES);
  }
  I zero_at(int64_t line) const { return zero ? widen(read<B>(zero + line * LANES)) : splat(int32_t(8)); }
};

// f(first row, rows, tile, y) fills y [rows, WIDTH] with a tile's outputs, behind which there is room for Segments::DEPTH of it,
// STACK floats apart; every 64 rows a thread goes through its tiles once.
template <int WIDTH, class Function>
void over_tiles(at::Tensor& out, int64_t inputs, const Function& f) {
  const int64_t rows = out.size(0), outputs = out.size(1), tiles = (outputs + WIDTH - 1) / WIDTH;
  const int64_t work = std::max<int64_t>(1, inputs * WIDTH * std::min<int64_t>(rows, ROWS));
  parallel_for(tiles, std::max<int64_t>(1, 262144 / work), [&](int64_t begin, int64_t end) {
    alignas(64) float y[Segments::DEPTH * STACK];
    for (int64_t m = 0; m < rows; m += ROWS)
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t count = std::min<int64_t>(ROWS, rows - m);
        f(m, count, tile, y);
        by_dtype(out.scalar_type(), [&](auto* type) {
          for (int64_t first = tile * WIDTH; first < std::min(outputs, (tile + 1) * WIDTH); first += LANES) {
            auto* to = static_cast<decltype(type)>(out.mutable_data_ptr()) + m * outputs + first;
            const float* from = y + first - tile * WIDTH;
            const int n = int(std::min<int64_t>(LANES, outputs - first));
            for (int64_t r = 0; r < count; ++r) store(to + r * outputs, load(from + r * WIDTH), n);
          }
        });
      }
  });
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
    products<R>(w.codes + at * bytes, q.code.data() + row * q.stride + g * w.group, q.stride, w.group / 8, sum);
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h)
      finish<R>(sum[h], w.scale_at(at * HALVES + h), q.scale.data() + g * rows + row, total[h]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < HALVES; ++h)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(y + r * TILE4 + h * LANES, total[h][r]);
}

// Rows that AMX multiplies, sixteen at a time, `step` inputs at a time, a group after the other and of it half a tile after the
// other: added to y. unpacked: room for half a tile's group.
void by_amx(const Codes& q, int64_t row, int64_t wide, const Packed& w, int64_t tile, int64_t first, int64_t last,
            int64_t step, uint8_t* unpacked, float* y) {
  const int64_t groups = w.inputs / w.group, bytes = w.group * TILE4 / 2, rows = q.rows;
  for (int64_t g = first / w.group; g < last / w.group; ++g)
    for (int64_t h = 0; h < HALVES; ++h) {
      alignas(64) int32_t sums[ROWS * LANES];
      const int64_t at = tile * groups + g;
      const int8_t* x = q.code.data() + row * q.stride + g * w.group;
      amx_unpack(w.codes + at * bytes + h * 64, HALVES * 64, w.group / 8, unpacked);
      if (wide == ROWS)
        amx_products<4>(unpacked, x, q.stride, w.group, step, sums);
      else
        for (int64_t r = 0; r < wide; r += AMX_ROWS)
          amx_products<1>(unpacked, x + r * q.stride, q.stride, w.group, step, sums + r * LANES);
      const I zero = w.zero_at(at * HALVES + h);
      const F scale = w.scale_at(at * HALVES + h);
      for (int64_t r = 0; r < wide; ++r) {
        const I sum = read<I>(sums + r * LANES) - zero * q.sum[g * rows + row + r];
        F total = load(y + r * TILE4 + h * LANES);
        finish<1>(&sum, scale, q.scale.data() + g * rows + row + r, &total);
        store(y + r * TILE4 + h * LANES, total);
      }
    }
}

void int4_by_int8(const Codes& q, const Packed& w, const Segments& segments, at::Tensor& out) {
  const int64_t step = w.group % 64 == 0 ? 64 : 32;
  const bool amx = q.rows >= AMX_ROWS && w.group % 32 == 0 && amx_allowed();
  over_tiles<TILE4>(out, w.inputs, [&](int64_t m, int64_t count, int64_t tile, float* stack) {
    const int64_t wide = amx ? count / AMX_ROWS * AMX_ROWS : 0;
    std::optional<AmxTiles> shape;  // for all segments of the inputs
    std::vector<uint8_t> unpacked;
    if (wide) shape.emplace(step), unpacked.resize(w.group * LANES);
    segments.sum(stack, STACK, count * TILE4, [&](int64_t first, int64_t last, float* y) {
      if (wide) by_amx(q, m, wide, w, tile, first, last, step, unpacked.data(), y);
      by_rows(count - wide, [&]<int R>(int64_t r) {
        by_registers<R>(q, m + wide + r, w, tile, first, last, y + (wide + r) * TILE4);
      });
    });
  });
}

// x: rows of floats, stride apart.
void int4_by_16bit(const float* x, int64_t stride, const Packed& w, const Segments& segments, at::Tensor& out) {
  const int64_t groups = w.inputs / w.group, bytes = w.group * TILE4 / 2;
  over_tiles<TILE4>(out, w.inputs, [&](int64_t m, int64_t count, int64_t tile, float* stack) {
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

void int8_by_int8(const Codes& q, const Packed& w, at::Tensor& out) {
  const int64_t step = w.inputs % 64 == 0 ? 64 : 32;
  const bool amx = out.size(0) >= AMX_ROWS && w.inputs % 32 == 0 && amx_allowed();
  over_tiles<LANES>(out, w.inputs, [&](int64_t m, int64_t count, int64_t tile, float* y) {
    const F own = w.scale_at(tile);
    const uint8_t* codes = w.codes + tile * w.inputs * LANES;
    const int8_t* x = q.code.data() + m * q.stride;
    auto finish = [&](int64_t r, I sum) {
      const I exact = sum - splat(q.sum[m + r] * 128);
      store(y + r * LANES, to_float(exact) * (splat(q.scale[m + r]) * own));
    };
    int64_t done = 0;
    if (amx && count >= AMX_ROWS) {
      AmxTiles tiles(step);
      alignas(64) int32_t sums[ROWS * LANES];
      if (count == ROWS) {
        amx_products<4>(codes, x, q.stride, w.inputs, step, sums);
        done = ROWS;
      }
      for (; done + AMX_ROWS <= count; done += AMX_ROWS)
        amx_products<1>(codes, x + done * q.stride, q.stride, w.inputs, step, sums + done * LANES);
      for (int64_t r = 0; r < done; ++r) finish(r, read<I>(sums + r * LANES));
    }
    by_rows(count - done, [&]<int R>(int64_t r) {
      I sum[R] = {};
      products8<R>(codes, x + (done + r) * q.stride, q.stride, w.inputs / 4, sum);
      for (int i = 0; i < R; ++i) finish(done + r + i, sum[i]);
    });
  });
}

Codes quantize(const at::Tensor& x, int64_t group) {
  Codes q;
  by_dtype(x.scalar_type(), [&](auto* type) {
    q = quantize(static_cast<decltype(type)>(x.data_ptr()), x.size(0), x.size(1), group);
  });
  return q;
}

}  // namespace

// x [M, K], weight [tiles, K / 8, 32, 4], scale [tiles, K / group, 32] bfloat16 or float32, zero alike or absent.
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, int64_t outputs, int64_t group, bool eight,
                       at::IntArrayRef borders, at::ScalarType dtype) {
  const int64_t rows = x.size(0), inputs = x.size(1), tiles = (outputs + TILE4 - 1) / TILE4;
  TORCH_CHECK(x.is_contiguous() && weight.nbytes() == size_t(tiles * inputs * TILE4 / 2), "the packing doesn't fit");
  TORCH_CHECK(scale.numel() * group == tiles * inputs * TILE4 && group % 8 == 0, "the scales don't fit");
  const Segments segments(borders, inputs, group);
  at::Tensor out = at::empty({rows, outputs}, x.options().dtype(dtype));
  const Packed w{static_cast<const uint8_t*>(weight.const_data_ptr()), scale.const_data_ptr(),
                 scale.scalar_type() == at::kBFloat16,
                 zero ? static_cast<const uint8_t*>(zero->const_data_ptr()) : nullptr, inputs, group};
  if (eight) {
    int4_by_int8(quantize(x, group), w, segments, out);
    return out;
  }
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

// x [M, K], weight [tiles, padded K / 4, 16, 4] of code + 128, scale [tiles, 16].
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, int64_t outputs) {
  const int64_t rows = x.size(0), inputs = x.size(1), tiles = (outputs + LANES - 1) / LANES;
  const int64_t padded = (inputs + 3) / 4 * 4;
  TORCH_CHECK(x.is_contiguous() && weight.nbytes() == size_t(tiles * padded * LANES), "the packing doesn't fit");
  TORCH_CHECK(inputs >= 1 && inputs <= 65536, "an 8-bit product takes 1 to 65536 inputs, so that its sums fit 32 bits");
  at::Tensor out = at::empty({rows, outputs}, x.options());
  const Packed w{static_cast<const uint8_t*>(weight.const_data_ptr()), scale.const_data_ptr(), false, nullptr, padded, 0};
  int8_by_int8(quantize(x, inputs), w, out);
  return out;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "int4_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, int outputs, int group, bool eight, int[] borders, "
      "ScalarType dtype) -> Tensor",
      &quasar::int4_linear);
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, int outputs) -> Tensor", &quasar::int8_linear);
}
