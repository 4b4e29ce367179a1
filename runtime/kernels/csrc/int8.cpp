// Products with packed weights of eight bits by activations of eight bits.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "dot.h"
#include "packed.h"

namespace quasar {
namespace {

// All of one tile of eight bits for R rows.
template <int R>
QUASAR_INLINE void products8(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t steps, I* sum) {
  for (int64_t s = 0; s < steps; ++s) {
    const I w = read<I>(weight + s * 64);
    ask(weight + s * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = dot<false>(sum[r], w, read<int32_t>(x + r * stride + s * 4));
  }
}

void int8_by_int8(const Codes& q, const Packed& w, at::Tensor& out) {
  const int64_t step = amx_step(q.rows, w.inputs);
  over_tiles<LANES>(out, w.inputs, step, [&](int64_t m, int64_t count, int64_t tile, float* y) {
    const F own = w.scale_at(tile);
    const uint8_t* codes = w.codes + tile * w.inputs * LANES;
    const int8_t* x = q.at(m);
    auto finish = [&](int64_t r, I sum) {
      const I exact = sum - splat(q.sum[m + r] * 128);
      store(y + r * LANES, to_float(exact) * (splat(q.scale[m + r]) * own));
    };
    const int64_t wide = step ? amx_rows(count) : 0;
    for (int64_t r = 0; r < wide; r += AMX_ROWS) {
      alignas(64) int32_t sums[AMX_ROWS * LANES];
      amx_products8(codes, x + r * q.stride, q.stride, w.inputs, step, r == 0, sums);
      for (int64_t i = 0; i < std::min<int64_t>(AMX_ROWS, wide - r); ++i) finish(r + i, read<I>(sums + i * LANES));
    }
    by_rows(count - wide, [&]<int R>(int64_t r) {
      I sum[R] = {};
      products8<R>(codes, x + (wide + r) * q.stride, q.stride, w.inputs / 4, sum);
      for (int i = 0; i < R; ++i) finish(wide + r + i, sum[i]);
    });
  });
}

}  // namespace

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
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, int outputs) -> Tensor", &quasar::int8_linear);
}
