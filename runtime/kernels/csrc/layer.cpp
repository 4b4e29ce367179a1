// What a decoder layer does between its products: norms, rotary positions on the way to the cache, gated activations.
//
// Arithmetic is float; values are rounded to the tensors' dtype where a chain of torch operations would store them, which
// costs nothing here and keeps 16-bit results next to those of such a chain. A row, or a head of a row, is computed by one
// thread in an order that its width alone fixes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "codes.h"
#include "rows.h"
#include "simd.h"
#include "team.h"

namespace quasar {
namespace {

// To the dtype and back.
template <class T>
QUASAR_INLINE F rounded(F x) {
  if constexpr (std::is_same_v<T, c10::Half>) return from_half(to_half(x));
  if constexpr (std::is_same_v<T, c10::BFloat16>) return bits<F>(to_bfloat16(x) << 16);
  return x;
}

// 1 / the root mean square of `width` floats, which zeros follow up to a whole vector.
float inverse_rms(const float* x, int64_t width, float eps) {
  F squares = {};
  for (int64_t d = 0; d < width; d += LANES) {
    const F v = load(x + d);
    squares = fma(v, v, squares);
  }
  return 1.0f / std::sqrt(sum(squares) / float(width) + eps);
}

// x = x / rms * weight; `early`: rounded before the weight as well as after.
template <class T>
void normalize(float* x, const float* weight, int64_t width, float eps, bool early) {
  const F inverse = splat(inverse_rms(x, width, eps));
  for (int64_t d = 0; d < width; d += LANES) {
    F y = load(x + d) * inverse;
    if (early) y = rounded<T>(y);
    store(x + d, rounded<T>(y * load(weight + d, lanes_at(d, width))));
  }
}

int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// x[d], x[d + half] of the first 2 * half values turn by the angles of the position.
template <class T>
void rotate(float* x, const T* cos, const T* sin, int64_t half) {
  for (int64_t d = 0; d < half; d += LANES) {
    const int n = lanes_at(d, half);
    const F a = load(x + d, n), b = load(x + half + d, n);
    const F low = rounded<T>(a * load(cos + d, n)) - rounded<T>(b * load(sin + d, n));
    const F high = rounded<T>(b * load(cos + half + d, n)) + rounded<T>(a * load(sin + half + d, n));
    store(x + d, rounded<T>(low), n);
    store(x + half + d, rounded<T>(high), n);
  }
}

QUASAR_INLINE F sigmoid(F x) {
  const F e = exp(bits<F>(bits<U>(x) | 0x80000000u)), one = splat(1.0f);  // of -|x|
  return (x < F{} ? e : one) / (one + e);
}

QUASAR_INLINE F silu(F x) { return x * sigmoid(x); }

// x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), which doesn't cancel where tanh is near -1.
QUASAR_INLINE F gelu(F x) { return x * sigmoid(splat(1.5957691216f) * fma(splat(0.044715f) * x * x, x, x)); }

// x + residual, each row of which is normed: f(its number, its floats, null of x's type); work: what that is to one norm, about.
template <class Function>
at::Tensor norm_rows(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                     const std::optional<at::Tensor>& residual, int64_t work, const Function& f) {
  const int64_t rows = x.size(0), width = x.size(1);
  at::Tensor total = residual ? at::empty_like(x) : x;
  const float* w = weight.const_data_ptr<float>();
  by_dtype(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* more = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    auto* added = more ? static_cast<T*>(total.mutable_data_ptr()) : nullptr;
    parallel_for(rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(width * work, 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> row(padded(width));
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t d = 0; d < width; d += LANES) {
          const int n = lanes_at(d, width);
          F v = load(from + m * width + d, n);
          if (more) {
            v = rounded<T>(v + load(more + m * width + d, n));
            store(added + m * width + d, v, n);
          }
          store(row.data() + d, v);
        }
        normalize<T>(row.data(), w, width, float(eps), early);
        f(m, row.data(), type);
      }
    });
  });
  return total;
}

// to = activation(gate) * up
template <class T>
void gate(const T* gates, const T* ups, int64_t width, bool is_gelu, T* to) {
  for (int64_t d = 0; d < width; d += LANES) {
    const int n = lanes_at(d, width);
    const F x = load(gates + d, n);
    store(to + d, rounded<T>(is_gelu ? gelu(x) : silu(x)) * load(ups + d, n), n);
  }
}

}  // namespace

// x, residual [M, W], weight float32 [W] -> ((x + residual) / rms * weight, x + residual).
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                                            const std::optional<at::Tensor>& residual) {
  const int64_t width = x.size(1);
  at::Tensor out = at::empty_like(x);
  const at::Tensor total = norm_rows(x, weight, eps, early, residual, 1, [&](int64_t m, const float* row, auto* type) {
    auto* to = static_cast<decltype(type)>(out.mutable_data_ptr()) + m * width;
    for (int64_t d = 0; d < width; d += LANES) store(to + d, load(row + d), lanes_at(d, width));
  });
  return {out, total};
}

// The same, rounded at once by whoever normed a row.
std::tuple<Codes, at::Tensor> norm_codes(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                                         const std::optional<at::Tensor>& residual, int64_t group) {
  Codes codes(x.size(0), x.size(1), group);
  at::Tensor total =
      norm_rows(x, weight, eps, early, residual, 2, [&](int64_t m, const float* row, auto*) { codes.put(m, row); });
  return {std::move(codes), total};
}

// qkv [T, (H + 2 KV) * D], cos and sin [T, R] -> queries [T, H, D]; keys and values go to the caches' slots.
at::Tensor rotary_write(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                        const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm, double eps,
                        bool early, at::Tensor key_cache, at::Tensor value_cache, const at::Tensor& slots, int64_t dim) {
  const int64_t count = qkv.size(0), kv = key_cache.size(1), block = key_cache.size(2);
  const int64_t all = qkv.size(1) / dim, heads = all - 2 * kv, turned = cos.size(1), total = key_cache.size(0) * block;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < count; ++t)
    TORCH_CHECK_INDEX(slot[t] < total, "slot ", slot[t], " is behind the cache's ", total);
  at::Tensor out = at::empty({count, heads, dim}, qkv.options());
  const float* norms[] = {query_norm ? query_norm->const_data_ptr<float>() : nullptr,
                          key_norm ? key_norm->const_data_ptr<float>() : nullptr};
  by_dtype(qkv.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_cache<T>(key_cache.scalar_type(), [&](auto* row_type) {
      using C = std::remove_pointer_t<decltype(row_type)>;
      const auto *from = static_cast<const T*>(qkv.const_data_ptr()), *c = static_cast<const T*>(cos.const_data_ptr()),
                 *s = static_cast<const T*>(sin.const_data_ptr());
      auto* query = static_cast<T*>(out.mutable_data_ptr());
      auto *keys = static_cast<C*>(key_cache.mutable_data_ptr()), *values = static_cast<C*>(value_cache.mutable_data_ptr());
      const int64_t width = row_width<C>(dim);
      parallel_for(count * all, 128, [&](int64_t begin, int64_t end) {
        std::vector<float> x(padded(dim));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t t = i / all, h = i % all;
          const bool is_query = h < heads, is_key = !is_query && h < heads + kv;
          const T* head = from + i * dim;
          if (!is_query && slot[t] < 0) continue;
          const int64_t place = h - heads - (is_key ? 0 : kv);
          const int64_t to = ((slot[t] / block * kv + place) * block + slot[t] % block) * width;
          if (!is_query && !is_key) {
            put_row(values + to, head, dim);
            continue;
          }
          for (int64_t d = 0; d < dim; d += LANES) store(x.data() + d, load(head + d, lanes_at(d, dim)));
          if (const float* norm = norms[is_key]) normalize<T>(x.data(), norm, dim, float(eps), early);
          rotate(x.data(), c + t * turned, s + t * turned, turned / 2);
          if (is_query) put_row(query + (t * heads + h) * dim, x.data(), dim);
          else put_row(keys + to, x.data(), dim);
        }
      });
    });
  });
  return out;
}

// both [M, 2 I], gates before ups -> activation(gate) * up [M, I].
at::Tensor gated(const at::Tensor& both, bool is_gelu) {
  const int64_t rows = both.size(0), width = both.size(1) / 2;
  at::Tensor out = at::empty({rows, width}, both.options());
  by_dtype(both.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(both.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    parallel_for(rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        gate(from + 2 * m * width, from + (2 * m + 1) * width, width, is_gelu, to + m * width);
    });
  });
  return out;
}

// The same, rounded at once, a group after the other.
Codes gated_codes(const at::Tensor& both, bool is_gelu, int64_t group) {
  const int64_t rows = both.size(0), width = both.size(1) / 2;
  Codes codes(rows, width, group);
  const int64_t groups = codes.groups();
  by_dtype(both.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(both.const_data_ptr());
    parallel_for(rows * groups, std::max<int64_t>(1, 1024 / group), [&](int64_t begin, int64_t end) {
      std::vector<T> one(group);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / groups, g = i % groups;
        const T* gates = from + 2 * m * width + g * group;
        gate(gates, gates + width, group, is_gelu, one.data());
        codes.put(m, g, one.data());
      }
    });
  });
  return codes;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool early, Tensor? residual) -> (Tensor, Tensor)", &quasar::rms_norm);
  m.def(
      "rotary_write(Tensor qkv, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float eps, bool early, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, int dim) -> Tensor",
      &quasar::rotary_write);
  m.def("gated(Tensor both, bool is_gelu) -> Tensor", &quasar::gated);
}
