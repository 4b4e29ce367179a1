// The best token of a slice of the vocabulary under keyed Gumbel noise.
//
// The noise is a hash of (seed, position, token), so it is computed where it can matter and nowhere else: a token whose
// score could not win with the largest noise there is isn't hashed, and of those hashed only the few whose uniform
// number is large enough for their distance from the best so far get their two logarithms.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"
#include "team.h"

namespace quasar {
namespace {

constexpr uint32_t MULTIPLIER[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t WEYL[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int ROUNDS = 10;

// The high half of sixteen products of 32 bits each.
QUASAR_INLINE U high_product(U a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i x = __m512i(a), y = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return U(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#else
  U y;
  for (int i = 0; i < LANES; ++i) y[i] = uint64_t(a[i]) * b >> 32;
  return y;
#endif
}

// The first word of Philox-4x32-10 for the counters (token, position, 0, 0).
U philox(U token, uint32_t position, uint64_t seed) {
  U c0 = token, c1 = U{} + position, c2 = U{}, c3 = U{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < ROUNDS; ++i) {
    const U high0 = high_product(c0, MULTIPLIER[0]), low0 = c0 * MULTIPLIER[0];
    const U high1 = high_product(c2, MULTIPLIER[1]), low1 = c2 * MULTIPLIER[1];
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += WEYL[0], k1 += WEYL[1];
  }
  return c0;
}

// The uniform number a token needs at least to bring noise of n or more, for whole n, a little less to be safe.
struct Needed {
  static constexpr int LOWEST = -2, HIGHEST = 17;
  float uniform[HIGHEST - LOWEST + 1];
  Needed() {
    for (int n = LOWEST; n <= HIGHEST; ++n) uniform[n - LOWEST] = std::exp(-std::exp(-double(n))) * (1 - 1e-6);
  }
  bool met(float u, float noise) const {
    const int n = int(std::floor(noise));
    return n < LOWEST || u >= uniform[n > HIGHEST ? HIGHEST - LOWEST : n - LOWEST];
  }
};

struct Best {
  float score;
  int64_t token;
};

// The first of the largest; where a value is NaN, that is.
template <class T>
Best largest(const T* row, int64_t count) {
  F top = splat(-std::numeric_limits<float>::infinity());
  I bad = I{}, at = I{};  // where, but for the lane, a lane's largest is first
  for (int64_t v = 0; v < count; v += LANES) {
    F x = load(row + v, int(std::min<int64_t>(LANES, count - v)));
    if (count - v < LANES)
      for (int i = int(count - v); i < LANES; ++i) x[i] = -std::numeric_limits<float>::infinity();
    bad |= I(x != x);
    const I more = I(x > top);
    top = more ? x : top;
    at = more ? splat(int32_t(v)) : at;
  }
  Best best{-std::numeric_limits<float>::infinity(), 0};
  for (int i = 0; i < LANES; ++i) {
    if (bad[i]) return {std::numeric_limits<float>::quiet_NaN(), 0};
    if (top[i] > best.score || (top[i] == best.score && at[i] + i < best.token)) best = {top[i], at[i] + i};
  }
  return best;
}

template <class T>
Best sampled(const T* row, int64_t count, float temperature, uint64_t seed, uint32_t position, uint32_t first,
             float top, float spread) {
  static const Needed needed;
  const float floor = top / temperature - spread;
  Best best{-std::numeric_limits<float>::infinity(), 0};
  for (int64_t v = 0; v < count; v += LANES) {
    const int lanes = int(std::min<int64_t>(LANES, count - v));
    const F scaled = load(row + v, lanes) / splat(temperature);
    const I near = I(scaled >= splat(floor));
    bool any = false;
    for (int i = 0; i < LANES; ++i) any |= near[i] != 0;
    if (!any) continue;
    U tokens;
    for (int i = 0; i < LANES; ++i) tokens[i] = first + uint32_t(v) + i;
    const U words = philox(tokens, position, seed);
    for (int i = 0; i < lanes; ++i) {
      if (!near[i]) continue;
      const float uniform = (float(words[i] >> 9) + 0.5f) * 0x1p-23f;
      if (!needed.met(uniform, best.score - scaled[i])) continue;
      const float score = scaled[i] + float(-std::log(-std::log(double(uniform))));
      if (score > best.score) best = {score, v + i};
    }
  }
  return best;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> best_tokens(const at::Tensor& logits, const at::Tensor& temperatures,
                                               const at::Tensor& seeds, const at::Tensor& positions, int64_t first,
                                               double spread) {
  const int64_t rows = logits.size(0), count = logits.size(1);
  at::Tensor scores = at::empty({rows}, logits.options().dtype(at::kFloat));
  at::Tensor ids = at::empty({rows}, logits.options().dtype(at::kLong));
  const auto* temperature = temperatures.const_data_ptr<float>();
  const auto *seed = seeds.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  auto* score = scores.data_ptr<float>();
  auto* id = ids.data_ptr<int64_t>();
  auto run = [&](const auto* data) {
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Best best = largest(data + r * count, count);
        if (temperature[r] > 0 && best.score == best.score)
          best = sampled(data + r * count, count, temperature[r], uint64_t(seed[r]), uint32_t(position[r]),
                         uint32_t(first), best.score, float(spread));
        score[r] = best.score, id[r] = first + best.token;
      }
    });
  };
  if (logits.scalar_type() == at::kBFloat16) run(logits.const_data_ptr<c10::BFloat16>());
  else if (logits.scalar_type() == at::kHalf) run(logits.const_data_ptr<c10::Half>());
  else run(logits.const_data_ptr<float>());
  return {scores, ids};
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "best_tokens(Tensor logits, Tensor temperatures, Tensor seeds, Tensor positions, int first, float spread) "
      "-> (Tensor, Tensor)",
      &quasar::best_tokens);
}
