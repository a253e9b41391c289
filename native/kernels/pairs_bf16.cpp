// Compiled for processors that multiply pairs of bfloat16: see pairs.cpp, which asks.
#include <immintrin.h>

#include <algorithm>

#include "kernels/pairs.h"

namespace penjing::pairs {

constexpr int64_t lanes = 16, vectors = width / lanes;

namespace {

// Two rows of sixteen columns, side by side; a mask for each.
__m512i pair_of(const uint16_t *one, const uint16_t *two, __mmask16 first, __mmask16 second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, one));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, two));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

__m512i pair_of(const float *one, const float *two, __mmask16 first, __mmask16 second) {
  const auto rounded = [](__mmask16 mask, const float *x) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x)));
  };
  return _mm512_or_si512(rounded(first, one), _mm512_slli_epi32(rounded(second, two), 16));
}

template <class T>
void pack_of(const PairRows &x, int64_t panel, int64_t first, int64_t pairs, uint32_t *packed) {
  for (int64_t k = 0; k < pairs; ++k) {
    const int64_t row = 2 * (first + k), next = std::min(row + 1, x.rows - 1);
    for (int64_t v = 0; v < vectors; ++v, packed += lanes) {
      const int64_t column = panel * width + v * lanes;
      const auto mask = static_cast<__mmask16>(
          _bzhi_u32(0xffff, static_cast<uint32_t>(std::clamp<int64_t>(x.columns - column, 0, lanes))));
      const auto *from = static_cast<const T *>(x.x) + column;
      _mm512_storeu_si512(packed, pair_of(from + row * x.stride, from + next * x.stride, mask, next == row ? 0 : mask));
    }
  }
}

} // namespace

void pack(const PairRows &x, int64_t panel, int64_t first, int64_t pairs, uint32_t *packed) {
  x.bfloat16 ? pack_of<uint16_t>(x, panel, first, pairs, packed) : pack_of<float>(x, panel, first, pairs, packed);
}

void add_tile(const uint32_t *eight, const uint32_t *panel, int64_t pairs, int64_t count, int64_t columns,
              int64_t stride, float *total) {
  __m512 sum[tile][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < tile; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v)
      sum[i][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, eight += width, panel += width) {
    __m512bh each[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v)
      each[v] = (__m512bh)_mm512_loadu_si512(panel + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < tile; ++i) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(static_cast<int>(eight[i]));
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v)
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], one, each[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      const auto left = static_cast<uint32_t>(std::clamp<int64_t>(columns - v * lanes, 0, lanes));
      const auto mask = static_cast<__mmask16>(i < count ? _bzhi_u32(0xffff, left) : 0);
      float *to = total + i * stride + v * lanes;
      if (mask)
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum[i][v]));
    }
}

} // namespace penjing::pairs
