// Rows of the KV cache: a head's numbers in the model's dtype, or in eight bits with a scale of their own behind them, a
// float in four bytes. `runtime/kernels/rows.py` says how they are rounded; every implementation gives the same bytes.
#pragma once

#include <cstring>

#include "simd.h"

namespace quasar {

struct Int8 {
  int8_t code;
};
struct Float8 {  // e4m3fn
  uint8_t code;
};

template <class C>
constexpr bool is_eight = sizeof(C) == 1;

template <class C>
int64_t row_width(int64_t dim) {
  return is_eight<C> ? dim + int64_t(sizeof(float)) : dim;
}

QUASAR_INLINE F load(const Int8* p) { return to_float((widen(read<B>(p)) ^ 0x80) - 0x80); }
QUASAR_INLINE F of_float8(U x) {  // as a half, whose exponents begin eight lower
  return from_half(narrow((x & 0x80u) << 8 | (x & 0x7fu) << 7)) * splat(256.0f);
}
QUASAR_INLINE F load(const Float8* p) { return of_float8(U(widen(read<B>(p)))); }

// The number that each lane's four bytes hold as number e.
template <class C>
QUASAR_INLINE F part_of(U x, int e) {
  if constexpr (std::is_same_v<C, float>) return bits<F>(x);
  if constexpr (std::is_same_v<C, c10::BFloat16>) return bits<F>(e ? x & 0xffff0000u : x << 16);
  if constexpr (std::is_same_v<C, c10::Half>) return from_half(narrow(e ? x >> 16 : x & 0xffffu));
  if constexpr (std::is_same_v<C, Int8>) return to_float(I(x << (24 - 8 * e)) >> 24);
  if constexpr (std::is_same_v<C, Float8>) return of_float8(x >> (8 * e) & 0xffu);
}

QUASAR_INLINE void store(Int8* p, F x) {
  const B b = narrow(round_to_int(x));
  std::memcpy(p, &b, sizeof(b));
}
QUASAR_INLINE void store(Float8* p, F x) {  // to nearest, half to even, of |x| up to 448
  const U sign = bits<U>(x) >> 24 & 0x80u, u = bits<U>(x) & 0x7fffffffu;
  const U large = ((u + 0x7ffffu + (u >> 20 & 1u)) >> 20) - 960u;       // three bits of the fraction; exponents from 7 on
  const U small = U(round_to_int(bits<F>(u) * splat(512.0f)));         // below 2^-6: steps of 2^-9
  const B b = narrow(I((u < 0x3c800000u ? small : large) | sign));
  std::memcpy(p, &b, sizeof(b));
}

// What a row's codes are multiplied with.
template <class C>
QUASAR_INLINE float scale_of(const C* row, int64_t dim) {
  if constexpr (is_eight<C>) return read<float>(row + dim);
  return 1.0f;
}

// Writes a row of a cache.
template <class C, class T>
void put_row(C* row, const T* x, int64_t dim) {
  if constexpr (std::is_same_v<C, T>) {
    std::memcpy(row, x, dim * sizeof(T));
  } else if constexpr (!is_eight<C>) {
    for (int64_t d = 0; d < dim; d += LANES) {
      const int n = int(std::min<int64_t>(LANES, dim - d));
      store(row + d, load(x + d, n), n);
    }
  } else {
    const float most_code = std::is_same_v<C, Int8> ? 127.0f : 448.0f;
    const Rounding how = Rounding::of(x, dim, most_code);
    for (int64_t d = 0; d < dim; d += LANES) {
      const int n = int(std::min<int64_t>(LANES, dim - d));
      store(row + d, how.some ? load(x + d, n) * how.inverse : F{}, n);
    }
    std::memcpy(row + dim, &how.scale, sizeof(how.scale));
  }
}

// Calls f with a null pointer of the type of a cache's numbers: T, or one of eight bits.
template <class T, class Function>
void by_cache(c10::ScalarType dtype, const Function& f) {
  if (dtype == c10::kChar) return f(static_cast<Int8*>(nullptr));
  if (dtype == c10::kFloat8_e4m3fn) return f(static_cast<Float8*>(nullptr));
  f(static_cast<T*>(nullptr));
}

}  // namespace quasar
