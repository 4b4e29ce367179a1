// Sums of products of bytes, which each instruction set does in its own way, always exactly; and of pairs of bfloat16.
#pragma once

#include "simd.h"

namespace quasar {

// acc[n] + the sum over i of (unsigned byte i of w[n]) * (signed byte i of x). A weight's bytes are below 16 if SMALL.
template <bool SMALL>
QUASAR_INLINE I dot(I acc, I w, int32_t x) {
#if defined(__AVX512VNNI__)
  return I(_mm512_dpbusd_epi32(__m512i(acc), __m512i(w), _mm512_set1_epi32(x)));
#elif defined(__AVXVNNI__) || defined(__AVX2__)
  struct Halves {
    __m256i half[2];
  };
  Halves a = bits<Halves>(acc), b = bits<Halves>(w);
  const __m256i c = _mm256_set1_epi32(x);
  for (int h = 0; h < 2; ++h) {
#if defined(__AVXVNNI__)
    a.half[h] = _mm256_dpbusd_avx_epi32(a.half[h], b.half[h], c);
#else
    if constexpr (SMALL) {  // two products of at most 15 * 128 fit 16 bits
      const __m256i pairs = _mm256_maddubs_epi16(b.half[h], c);
      a.half[h] = _mm256_add_epi32(a.half[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(b.half[h], _mm256_set1_epi16(255)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(c, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(b.half[h], 8), _mm256_srai_epi16(c, 8));
      a.half[h] = _mm256_add_epi32(a.half[h], _mm256_add_epi32(even, odd));
    }
#endif
  }
  return bits<I>(a);
#else
  for (int i = 0; i < 4; ++i) acc += ((w >> (8 * i)) & 255) * int32_t(int8_t(uint32_t(x) >> (8 * i)));
  return acc;
#endif
}

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

// acc[n] + the two products of bfloat16 in w[n] and in x, where a CPU multiplies pairs.
QUASAR_INLINE F dot_pairs(F acc, F w, int32_t x) {
#if defined(__AVX512BF16__)
  return F(_mm512_dpbf16_ps(__m512(acc), __m512bh(w), __m512bh(_mm512_set1_epi32(x))));
#else
  return acc;
#endif
}

// The four bits of each lane from bit `shift` on, as float.
QUASAR_INLINE F nibble(I w, int shift) {
#if defined(__AVX512F__)
  const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return F(_mm512_permutexvar_ps(_mm512_srli_epi32(__m512i(w), unsigned(shift)), codes));
#else
  return to_float((w >> shift) & 15);
#endif
}

}  // namespace quasar
