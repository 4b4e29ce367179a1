// Sixteen lanes of float or int32, on AVX-512, AVX2 or anything GCC's vector extensions can lower.
//
// Every file is compiled with -ffp-contract=off, so a product and a sum are fused exactly where fma() says so: the
// result of a lane depends on its operands alone, never on how the compiler unrolled the loop around it.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quasar {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint8_t B __attribute__((vector_size(16)));

#if defined(__CLZERO__)  // an instruction that no one else's have
constexpr bool AMD = true;
#else
constexpr bool AMD = false;
#endif
constexpr int LANES = 16;
constexpr int TILE4 = 2 * LANES;  // outputs of a tile of four-bit weights

#define QUASAR_INLINE inline __attribute__((always_inline))

QUASAR_INLINE F splat(float x) { return x - F{}; }  // without an addition: x + 0 is no x where x is -0
QUASAR_INLINE I splat(int32_t x) { return I{} + x; }
template <class To, class From>
QUASAR_INLINE To bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
template <class T>
QUASAR_INLINE T read(const void* p) {
  T y;
  std::memcpy(&y, p, sizeof(T));
  return y;
}

#if defined(__AVX512F__)
QUASAR_INLINE F fma(F a, F b, F c) { return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
QUASAR_INLINE F to_float(I x) { return F(_mm512_cvtepi32_ps(__m512i(x))); }
QUASAR_INLINE I round_to_int(F x) { return I(_mm512_cvtps_epi32(__m512(x))); }  // half to even
QUASAR_INLINE F max(F a, F b) { return F(_mm512_max_ps(__m512(a), __m512(b))); }
QUASAR_INLINE U widen(H x) { return U(_mm512_cvtepu16_epi32(__m256i(x))); }
QUASAR_INLINE I widen(B x) { return I(_mm512_cvtepu8_epi32(__m128i(x))); }
QUASAR_INLINE H narrow(U x) { return H(_mm512_cvtepi32_epi16(__m512i(x))); }
QUASAR_INLINE B narrow(I x) { return B(_mm512_cvtepi32_epi8(__m512i(x))); }
QUASAR_INLINE F from_half(H x) { return F(_mm512_cvtph_ps(__m256i(x))); }
QUASAR_INLINE H to_half(F x) { return H(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
#if defined(__AVX2__) && defined(__FMA__)
struct Pair {
  __m256 low, high;
};
QUASAR_INLINE Pair split(F x) { return bits<Pair>(x); }
QUASAR_INLINE F fma(F a, F b, F c) {
  Pair x = split(a), y = split(b), z = split(c);
  return bits<F>(Pair{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
#else
QUASAR_INLINE F fma(F a, F b, F c) { return a * b + c; }
#endif
QUASAR_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
QUASAR_INLINE F max(F a, F b) { return a > b ? a : b; }
QUASAR_INLINE I round_to_int(F x) {  // half to even, for |x| < 2^22
  const F magic = splat(12582912.0f);
  F shifted = x + magic;
  return bits<I>(shifted) - bits<I>(magic);
}
QUASAR_INLINE U widen(H x) { return __builtin_convertvector(x, U); }
QUASAR_INLINE I widen(B x) { return __builtin_convertvector(x, I); }
QUASAR_INLINE H narrow(U x) { return __builtin_convertvector(x, H); }
QUASAR_INLINE B narrow(I x) { return __builtin_convertvector(x, B); }
QUASAR_INLINE F from_half(H x) {
  F y;
  for (int i = 0; i < LANES; ++i) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
  return y;
}
QUASAR_INLINE H to_half(F x) {
  H y;
  for (int i = 0; i < LANES; ++i) y[i] = c10::detail::fp16_ieee_from_fp32_value(x[i]);
  return y;
}
#endif

QUASAR_INLINE F load(const float* p) { return read<F>(p); }
QUASAR_INLINE F load(const c10::Half* p) { return from_half(read<H>(p)); }
QUASAR_INLINE F load(const c10::BFloat16* p) { return bits<F>(widen(read<H>(p)) << 16); }
QUASAR_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
QUASAR_INLINE void store(c10::Half* p, F x) {
  H y = to_half(x);
  std::memcpy(p, &y, sizeof(y));
}
QUASAR_INLINE U to_bfloat16(F x) {  // to nearest, half to even; a NaN stays one
  const U u = bits<U>(x), nan = U{} + 0x7fc0u;
  return x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : nan;
}
QUASAR_INLINE void store(c10::BFloat16* p, F x) {
  const H y = narrow(to_bfloat16(x));
  std::memcpy(p, &y, sizeof(y));
}
// How many lanes from `at` on lie before the end.
inline int lanes_at(int64_t at, int64_t end) { return int(std::min<int64_t>(LANES, end - at)); }

// The first n of sixteen lanes; the others are read as zero and not written. The arithmetic is the whole vector's.
template <class T>
QUASAR_INLINE F load(const T* p, int n) {
  if (n >= LANES) return load(p);
  alignas(64) T whole[LANES] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
template <class T>
QUASAR_INLINE void store(T* p, F x, int n) {
  if (n >= LANES) return store(p, x);
  alignas(64) T whole[LANES];
  store(whole, x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// The first n of 64 bytes; the others are zero.
QUASAR_INLINE F read_bytes(const char* p, int64_t n) {
  if (n >= int64_t(sizeof(F))) return read<F>(p);
  F x = {};
  std::memcpy(&x, p, n);
  return x;
}

// Sums and maxima over the lanes, always folded by halves.
template <class V, class Function>
QUASAR_INLINE auto fold(V x, const Function& f) {
  typedef int32_t M __attribute__((vector_size(64)));
  const M lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) x = f(x, __builtin_shuffle(x, lane + half));
  return x[0];
}
template <class V>
QUASAR_INLINE auto sum(V x) {
  return fold(x, [](V a, V b) { return a + b; });
}
template <class V>
QUASAR_INLINE auto max(V x) {
  return fold(x, [](V a, V b) { return a > b ? a : b; });
}

// Rows become columns: four rounds of interleaving the first eight vectors with the last eight.
QUASAR_INLINE void transpose(F* x) {
  typedef int32_t M __attribute__((vector_size(64)));
  const M low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  F y[LANES];
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], low + 8);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = y[i];
  }
}

// A bit for each lane of a comparison.
QUASAR_INLINE uint32_t lanes_of(I x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(x), __m512i(x));
#else
  uint32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= uint32_t(x[i] != 0) << i;
  return found;
#endif
}

// e^x for x <= 0 (and up to 80), within two units in the last place; zero below -87.
QUASAR_INLINE F exp(F x) {
  F clamped = max(x, splat(-87.0f));
  I n = round_to_int(clamped * splat(1.44269504f));
  F k = to_float(n);
  F r = fma(k, splat(-0.693359375f), clamped);
  r = fma(k, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  F y = p * bits<F>((n + 127) << 23);
  y = x == x ? y : x;
  return x < splat(-87.0f) ? F{} : y;
}
QUASAR_INLINE float exp(float x) { return exp(splat(x))[0]; }
QUASAR_INLINE F tanh(F x) {
  F positive = bits<F>(bits<U>(x) & 0x7fffffffu);
  F e = exp(splat(-2.0f) * positive);
  F y = (splat(1.0f) - e) / (splat(1.0f) + e);
  return x < F{} ? -y : y;
}

// Calls f with a null pointer of the dtype's C++ type.
template <class Function>
void by_dtype(c10::ScalarType dtype, const Function& f) {
  if (dtype == c10::kFloat) return f(static_cast<float*>(nullptr));
  if (dtype == c10::kBFloat16) return f(static_cast<c10::BFloat16*>(nullptr));
  TORCH_CHECK(dtype == c10::kHalf, "float32, bfloat16 or float16 is needed, not ", dtype);
  f(static_cast<c10::Half*>(nullptr));
}

// How numbers that share a scale become codes of at most `most`: what they are multiplied with, and what a code is worth. Below
// 2^-100 they count as zero; where one isn't finite the scale is NaN.
struct Rounding {
  bool some;
  F inverse;
  float scale;

  template <class T>
  QUASAR_INLINE static Rounding of(const T* x, int64_t count, float most) {
    U top = {};  // as integers, magnitudes are in order, and infinities and NaN come last
    for (int64_t k = 0; k < count; k += LANES) {
      const U u = bits<U>(load(x + k, int(std::min<int64_t>(LANES, count - k)))) & 0x7fffffffu;
      top = u > top ? u : top;
    }
    const uint32_t largest = max(top);
    const float amax = bits<float>(largest);
    const bool finite = largest < 0x7f800000u, some = finite && amax >= 0x1p-100f;
    return {some, splat(some ? most / amax : 0.0f), some ? amax / most : finite ? 0.0f : NAN};
  }
};

}  // namespace quasar
