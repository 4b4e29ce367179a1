// Logits that are known within bounds: the floor under the largest, and exact ones for all that may reach it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "simd.h"
#include "team.h"

namespace quasar {
namespace {

constexpr int64_t BLOCK = 2048;  // tokens that a thread looks at in one go
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Near {
  int64_t row, token;
};

// In an order that the width alone fixes.
template <class T>
float product(const T* x, const T* y, int64_t width) {
  F sums[2] = {};
  for (int64_t d = 0; d < width; d += 2 * LANES)
    for (int i = 0; i < 2 && d + i * LANES < width; ++i) {
      const int64_t at = d + i * LANES;
      sums[i] = fma(load(x + at, lanes_at(at, width)), load(y + at, lanes_at(at, width)), sums[i]);
    }
  return sum(sums[0] + sums[1]);
}

}  // namespace

// logits [R, V], x [R, K], errors float32 [V] -> reach and floor, float32 [R].
std::tuple<at::Tensor, at::Tensor> floors(const at::Tensor& logits, const at::Tensor& x, const at::Tensor& errors,
                                          double sigmas) {
  const int64_t rows = logits.size(0), count = logits.size(1), width = x.size(1), blocks = (count + BLOCK - 1) / BLOCK;
  at::Tensor reach = at::empty({rows}, errors.options()), floor = at::empty({rows}, errors.options());
  auto *reaches = reach.data_ptr<float>(), *least = floor.data_ptr<float>();
  const auto* error = errors.const_data_ptr<float>();
  std::vector<float> found(blocks * rows, NOTHING);
  by_dtype(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto *logit = static_cast<const T*>(logits.const_data_ptr()), *from = static_cast<const T*>(x.const_data_ptr());
    for (int64_t r = 0; r < rows; ++r)
      reaches[r] = float(sigmas) * std::sqrt(product(from + r * width, from + r * width, width));
    parallel_for(blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t r = 0; r < rows; ++r) {
          F most = splat(NOTHING);
          const int64_t last = std::min(count, (b + 1) * BLOCK);
          for (int64_t v = b * BLOCK; v < last; v += LANES) {
            const int n = lanes_at(v, last);
            F low = load(logit + r * count + v, n) - splat(reaches[r]) * load(error + v, n);
            for (int i = n; i < LANES; ++i) low[i] = NOTHING;
            most = low > most ? low : most;
          }
          found[b * rows + r] = max(most);
        }
    });
  });
  for (int64_t r = 0; r < rows; ++r) {
    least[r] = NOTHING;
    for (int64_t b = 0; b < blocks; ++b) least[r] = std::max(least[r], found[b * rows + r]);
  }
  return {reach, floor};
}

// Logits [R, V] whose reach comes up to the floor become x [R, K] times weight [V, K].
void refine(at::Tensor logits, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& errors,
            const at::Tensor& reach, const at::Tensor& floor) {
  const int64_t rows = logits.size(0), count = logits.size(1), width = x.size(1);
  const auto *error = errors.const_data_ptr<float>(), *reaches = reach.const_data_ptr<float>(),
             *least = floor.const_data_ptr<float>();
  by_dtype(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* logit = static_cast<T*>(logits.data_ptr());
    const auto *from = static_cast<const T*>(x.const_data_ptr()), *table = static_cast<const T*>(weight.const_data_ptr());
    parallel_for((count + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
      std::vector<Near> near;
      for (int64_t v = begin * BLOCK; v < std::min(count, end * BLOCK); v += LANES)
        for (int64_t r = 0; r < rows; ++r) {
          const int n = lanes_at(v, count);
          const F high = load(logit + r * count + v, n) + splat(reaches[r]) * load(error + v, n);
          for (uint32_t left = lanes_of(I(high >= splat(least[r]))) & ((1u << n) - 1u); left; left &= left - 1)
            near.push_back({r, v + __builtin_ctz(left)});
        }
      std::sort(near.begin(), near.end(), [](const Near& a, const Near& b) { return a.token < b.token; });
      for (size_t i = 0; i < near.size(); ++i) {
        const auto [row, token] = near[i];
        if (i + 1 < near.size() && near[i + 1].token != token)  // lies anywhere, and is asked for ahead
          for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(table + near[i + 1].token * width + d);
        logit[row * count + token] = T(product(from + row * width, table + token * width, width));
      }
    });
  });
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def("floors(Tensor logits, Tensor x, Tensor errors, float sigmas) -> (Tensor, Tensor)", &quasar::floors);
  m.def("refine(Tensor(a!) logits, Tensor x, Tensor weight, Tensor errors, Tensor reach, Tensor floor) -> ()",
        &quasar::refine);
}
