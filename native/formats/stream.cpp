// What the compressor does to every weight, at the speed of memory: ranges, codes, packing, bitmasks.
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

void to_float(const void *x, Float type, int64_t n, float *y) {
  if (type == Float::f32) {
    std::memcpy(y, x, static_cast<size_t>(n) * sizeof *y);
    return;
  }
  const auto *halves = static_cast<const uint16_t *>(x);
  const auto convert = [&](const uint16_t *from) __attribute__((always_inline)) {
    return type == Float::bf16 ? from_bf16(from) : from_f16(from);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store(y + i, convert(halves + i));
  if (i < n) {
    uint16_t last[16] = {};
    std::memcpy(last, halves + i, static_cast<size_t>(n - i) * sizeof *last);
    store(y + i, convert(last), static_cast<int>(n - i));
  }
}

void group_ranges(const float *x, int64_t groups, int64_t group, float *low, float *high) {
  for (int64_t g = 0; g < groups; ++g, x += group) {
    F16 lows = zero(), highs = zero();
    int64_t i = 0;
    for (; i + 16 <= group; i += 16) {
      const F16 v = load(x + i);
      lows = min(v, lows);
      highs = max(v, highs);
    }
    if (i < group) {
      const F16 v = load(x + i, static_cast<int>(group - i));
      lows = min(v, lows);
      highs = max(v, highs);
    }
    low[g] = least(lows);
    high[g] = greatest(highs);
  }
}

void encode_groups(const float *x, int64_t groups, int64_t group, const float *inverse, const float *zero_point,
                   float qmin, float qmax, int8_t *codes) {
  const F16 low = splat(qmin), high = splat(qmax);
  for (int64_t g = 0; g < groups; ++g, x += group, codes += group) {
    const F16 scale = splat(inverse[g]), bias = splat(zero_point[g]);
    const auto encode = [&](F16 v) __attribute__((always_inline)) {
      return round(min(max(add(mul(v, scale), bias), low), high));
    };
    int64_t i = 0;
    for (; i + 16 <= group; i += 16)
      store_int8(codes + i, encode(load(x + i)));
    if (i < group) {
      const int left = static_cast<int>(group - i);
      store_int8(codes + i, encode(load(x + i, left)), left);
    }
  }
}

namespace {

constexpr uint64_t each_byte = 0x0101010101010101u;

// Eight bytes' low bits side by side, and back.
PENJING_INLINE uint64_t gather_bits(uint64_t bytes, int bits) {
#if defined(__AVX2__)
  return _pext_u64(bytes, each_byte * ((1u << bits) - 1));
#else
  uint64_t stream = 0;
  for (int i = 0; i < 8; ++i)
    stream |= (bytes >> 8 * i & ((1u << bits) - 1)) << bits * i;
  return stream;
#endif
}

PENJING_INLINE uint64_t spread_bits(uint64_t stream, int bits) {
#if defined(__AVX2__)
  return _pdep_u64(stream, each_byte * ((1u << bits) - 1));
#else
  uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i)
    bytes |= (stream >> bits * i & ((1u << bits) - 1)) << 8 * i;
  return bytes;
#endif
}

} // namespace

void pack(const int8_t *codes, int64_t n, int bits, uint8_t *stream) {
  const uint64_t flip = each_byte << (bits - 1); // code − qmin, modulo 2^bits
  for (int64_t i = 0; i < n; i += 8, stream += bits) {
    uint64_t eight;
    std::memcpy(&eight, codes + i, sizeof eight);
    eight = gather_bits(eight ^ flip, bits);
    std::memcpy(stream, &eight, static_cast<size_t>(bits));
  }
}

void unpack(const uint8_t *stream, int64_t n, int bits, int8_t *codes) {
  const uint64_t sign = each_byte * 0x80, offset = (each_byte * 0x80) - (each_byte << (bits - 1));
  for (int64_t i = 0; i < n; i += 8, stream += bits) {
    uint64_t eight = 0;
    std::memcpy(&eight, stream, static_cast<size_t>(bits));
    eight = (spread_bits(eight, bits) + offset) ^ sign; // + qmin in each byte, without a borrow
    std::memcpy(codes + i, &eight, sizeof eight);
  }
}

bool has_nonfinite(const void *x, Float type, int64_t n) {
  int64_t found = 0;
  if (type == Float::f32) {
    const auto *words = static_cast<const uint32_t *>(x);
    for (int64_t i = 0; i < n; ++i)
      found += (words[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const auto *halves = static_cast<const uint16_t *>(x);
    const uint16_t exponent = type == Float::bf16 ? 0x7f80 : 0x7c00;
    for (int64_t i = 0; i < n;) { // found in sixteen bits, so that the loop is as wide as can be
      const int64_t end = n - i < 4096 ? n : i + 4096;
      uint16_t some = 0;
      for (; i < end; ++i)
        some |= static_cast<uint16_t>((halves[i] & exponent) == exponent);
      found += some;
    }
  }
  return found != 0;
}

namespace {

template <class T>
int64_t compress_row(const T *row, int64_t n, T significant, uint8_t *bitmask, T *kept) {
  T *const begin = kept;
  int64_t i = 0;
#if defined(__AVX512VNNI__)
  for (constexpr int step = 64 / sizeof(T); i + step <= n; i += step) {
    const __m512i v = _mm512_loadu_si512(row + i);
    uint64_t mask;
    if constexpr (sizeof(T) == 1) {
      mask = _mm512_test_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(significant)));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi8(mask, v));
    } else if constexpr (sizeof(T) == 2) {
      mask = _mm512_test_epi16_mask(v, _mm512_set1_epi16(static_cast<short>(significant)));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi16(static_cast<__mmask32>(mask), v));
    } else {
      mask = _mm512_test_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(significant)));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v));
    }
    std::memcpy(bitmask + i / 8, &mask, step / 8);
    kept += __builtin_popcountll(mask);
  }
#endif
  for (; i < n; i += 8) {
    unsigned bits = 0;
    for (int64_t j = 0; j < 8 && i + j < n; ++j) {
      const unsigned bit = (row[i + j] & significant) != 0;
      *kept = row[i + j];
      kept += bit;
      bits |= bit << j;
    }
    bitmask[i / 8] = static_cast<uint8_t>(bits);
  }
  return kept - begin;
}

template <class T>
int64_t expand_row(const T *kept, const uint8_t *bitmask, int64_t n, T *row) {
  const T *const begin = kept;
  int64_t i = 0;
#if defined(__AVX512VNNI__)
  for (constexpr int step = 64 / sizeof(T); i + step <= n; i += step) {
    uint64_t mask = 0;
    std::memcpy(&mask, bitmask + i / 8, step / 8);
    __m512i v;
    if constexpr (sizeof(T) == 1)
      v = _mm512_maskz_expandloadu_epi8(mask, kept);
    else if constexpr (sizeof(T) == 2)
      v = _mm512_maskz_expandloadu_epi16(static_cast<__mmask32>(mask), kept);
    else
      v = _mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), kept);
    _mm512_storeu_si512(row + i, v);
    kept += __builtin_popcountll(mask);
  }
#endif
  for (; i < n; ++i) {
    const unsigned bit = bitmask[i / 8] >> (i % 8) & 1;
    row[i] = bit ? *kept : T{0};
    kept += bit;
  }
  return kept - begin;
}

} // namespace

int64_t compress(const void *row, int64_t n, int width, uint32_t significant, uint8_t *bitmask, void *kept) {
  switch (width) {
  case 1:
    return compress_row(static_cast<const uint8_t *>(row), n, static_cast<uint8_t>(significant), bitmask,
                        static_cast<uint8_t *>(kept));
  case 2:
    return compress_row(static_cast<const uint16_t *>(row), n, static_cast<uint16_t>(significant), bitmask,
                        static_cast<uint16_t *>(kept));
  default:
    return compress_row(static_cast<const uint32_t *>(row), n, significant, bitmask, static_cast<uint32_t *>(kept));
  }
}

int64_t expand(const void *kept, const uint8_t *bitmask, int64_t n, int width, void *row) {
  switch (width) {
  case 1: return expand_row(static_cast<const uint8_t *>(kept), bitmask, n, static_cast<uint8_t *>(row));
  case 2: return expand_row(static_cast<const uint16_t *>(kept), bitmask, n, static_cast<uint16_t *>(row));
  default: return expand_row(static_cast<const uint32_t *>(kept), bitmask, n, static_cast<uint32_t *>(row));
  }
}

} // namespace penjing::PENJING_ISA
