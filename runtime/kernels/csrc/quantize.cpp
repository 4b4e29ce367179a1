// Weights into four bits, to nearest, and into the order that the products of `packed.h` read them in.
//
// The bits are those of `runtime/quantize/int4.py`: the same operations on the same float32 values, one rounding at a time,
// and sums folded by halves.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "simd.h"
#include "team.h"

namespace quasar {
namespace {

constexpr int32_t MIDDLE = 8;
constexpr int64_t GRAIN = 1 << 15;  // weights that are worth a thread

float narrow_scale(float x) {
  const float scale = float(c10::BFloat16(x));
  return scale > 0x1p-120f ? scale : 1.0f;
}

// One group: values in float32, the codes being tried and the squares of their errors, each filled up to whole vectors.
class Group {
 public:
  explicit Group(int64_t size)
      : size_(size), values_(padded()), squares_(padded()), codes_(padded()) {}

  // Returns whether all values are finite.
  template <class T>
  bool take(const T* from) {
    U top = {};
    F low = {}, high = {};  // zero counts as a value
    for (int64_t k = 0; k < size_; k += LANES) {
      const F x = load(from + k, int(std::min<int64_t>(LANES, size_ - k)));
      store(values_.data() + k, x, LANES);
      const U u = bits<U>(x) & 0x7fffffffu;
      top = u > top ? u : top;
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    uint32_t most = 0;
    low_ = high_ = 0.0f;
    for (int i = 0; i < LANES; ++i) {
      most = std::max<uint32_t>(most, top[i]);
      low_ = std::min(low_, low[i]);
      high_ = std::max(high_, high[i]);
    }
    return most < 0x7f800000u;
  }

  // Puts the codes under the best of three scales, and that scale.
  void symmetric(uint8_t* to, float& scale) {
    const float amax = std::max(-low_, high_);
    float best = INFINITY;
    for (const float steps : {7.0f, 7.5f, 8.0f}) {
      const float tried = narrow_scale(amax / steps);
      code(tried, MIDDLE);
      const float error = fold_errors(tried);
      if (error < best) {
        best = error;
        scale = tried;
        std::memcpy(to, codes_.data(), size_);
      }
    }
  }

  void with_zero(uint8_t* to, float& scale, uint8_t& zero) {
    scale = narrow_scale((high_ - low_) / 15.0f);
    const int32_t middle = std::clamp(round_to_int(splat(-low_ / scale))[0], 0, 15);
    zero = uint8_t(middle);
    code(scale, middle);
    std::memcpy(to, codes_.data(), size_);
  }

 private:
  size_t padded() const { return size_t((size_ + LANES - 1) / LANES * LANES); }

  void code(float scale, int32_t zero) {
    const F steps = splat(scale);
    const I least = {}, most = splat(15), middle = splat(zero);
    for (int64_t k = 0; k < size_; k += LANES) {
      I c = round_to_int(read<F>(values_.data() + k) / steps) + middle;
      c = c < least ? least : c;
      c = c > most ? most : c;
      const B b = narrow(c);
      std::memcpy(codes_.data() + k, &b, LANES);
    }
  }

  float fold_errors(float scale) {
    const F steps = splat(scale);
    const I middle = splat(MIDDLE);
    for (int64_t k = 0; k < size_; k += LANES) {
      const F off = to_float(widen(read<B>(codes_.data() + k)) - middle) * steps - read<F>(values_.data() + k);
      store(squares_.data() + k, off * off, LANES);
    }
    float* square = squares_.data();
    for (int64_t left = size_; left > 1;) {
      const int64_t half = left / 2;
#pragma GCC ivdep
      for (int64_t i = 0; i < half; ++i) square[i] += square[half + i];
      if (left % 2) square[half] = square[2 * half];
      left -= half;
    }
    return square[0];
  }

  int64_t size_;
  float low_ = 0.0f, high_ = 0.0f;
  std::vector<float> values_, squares_;
  std::vector<uint8_t> codes_;
};

}  // namespace

// weight [N, K] -> codes uint8 [N, K], scale float32 and zero uint8 [N, K / group]; false where a value isn't finite.
std::tuple<at::Tensor, at::Tensor, at::Tensor, bool> quantize_int4(const at::Tensor& weight, int64_t group, bool symmetric) {
  TORCH_CHECK(weight.dim() == 2 && weight.stride(1) == 1, "a weight's inputs lie side by side");
  const int64_t outputs = weight.size(0), inputs = weight.size(1), groups = inputs / group, stride = weight.stride(0);
  TORCH_CHECK(group > 0 && inputs % group == 0, "the inputs don't divide into groups");
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor codes = at::empty({outputs, inputs}, bytes), zero = at::empty({outputs, groups}, bytes);
  at::Tensor scale = at::empty({outputs, groups}, weight.options().dtype(at::kFloat));
  std::atomic<bool> finite = true;
  by_dtype(weight.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(weight.data_ptr());
    parallel_for(outputs, std::max<int64_t>(1, GRAIN / std::max<int64_t>(inputs, 1)), [&](int64_t begin, int64_t end) {
      Group g(group);
      bool fine = true;
      for (int64_t i = begin * groups; i < end * groups; ++i) {
        uint8_t* to = codes.data_ptr<uint8_t>() + i * group;
        float& s = scale.data_ptr<float>()[i];
        uint8_t& z = zero.data_ptr<uint8_t>()[i];
        fine = g.take(from + i / groups * stride + i % groups * group) && fine;
        if (!fine) break;
        if (symmetric) {
          z = uint8_t(MIDDLE);
          g.symmetric(to, s);
        } else {
          g.with_zero(to, s, z);
        }
      }
      if (!fine) finite = false;
    });
  });
  return {codes, scale, zero, finite.load()};
}

// codes uint8 [N, K] below 16 -> [tiles, K / 8, 32, 4]: of eight inputs, the first four are low halves, the others high.
at::Tensor tile_int4(const at::Tensor& codes) {
  const int64_t outputs = codes.size(0), inputs = codes.size(1), tiles = (outputs + TILE4 - 1) / TILE4, steps = inputs / 8;
  TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == at::kByte && inputs % 8 == 0, "codes don't fit");
  at::Tensor out = at::empty({tiles, steps, TILE4, 4}, codes.options());
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  uint8_t* to = out.data_ptr<uint8_t>();
  parallel_for(tiles, std::max<int64_t>(1, GRAIN / std::max<int64_t>(TILE4 * inputs, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      uint8_t* tile = to + t * steps * TILE4 * 4;
      for (int64_t r = 0; r < TILE4; ++r) {
        const int64_t row = t * TILE4 + r;
        for (int64_t s = 0; s < steps; ++s) {
          const uint64_t eight = row < outputs ? read<uint64_t>(from + row * inputs + s * 8) : 0;
          const uint32_t four = uint32_t(eight) | uint32_t(eight >> 32) << 4;
          std::memcpy(tile + (s * TILE4 + r) * 4, &four, 4);
        }
      }
    }
  });
  return out;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def("quantize_int4(Tensor weight, int group, bool symmetric) -> (Tensor, Tensor, Tensor, bool)", &quasar::quantize_int4);
  m.def("tile_int4(Tensor codes) -> Tensor", &quasar::tile_int4);
}
