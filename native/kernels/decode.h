// From a panel's bytes to its weights as float, sixteen columns at a time.
#pragma once

#include "kernels/expand.h"
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls use(Constant<0>{}), …, use(Constant<n − 1>{}).
template <int n, class Use>
PENJING_INLINE void unroll(Use &&use) {
  if constexpr (n > 0) {
    unroll<n - 1>(use);
    use(Constant<n - 1>{});
  }
}

// One a code: block(p, use) decodes the sixteen columns at p, calls use(column, value), and returns what follows.
template <Code code>
struct Dense;

template <>
struct Dense<Code::f32> {
  static constexpr int64_t bytes = 16 * lanes * 4;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, load(reinterpret_cast<const float *>(p) + k.value * lanes));
    });
  }
};

template <>
struct Dense<Code::bf16> {
  static constexpr int64_t bytes = 16 * lanes * 2;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, from_bf16(reinterpret_cast<const uint16_t *>(p) + k.value * lanes));
    });
  }
};

template <>
struct Dense<Code::f16> {
  static constexpr int64_t bytes = 16 * lanes * 2;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, from_f16(reinterpret_cast<const uint16_t *>(p) + k.value * lanes));
    });
  }
};

template <>
struct Dense<Code::int8> {
  static constexpr int64_t bytes = 16 * lanes;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, from_int8(reinterpret_cast<const int8_t *>(p) + k.value * lanes));
    });
  }
};

// A lane has eight columns' codes of one row, the first in the lowest bits.
template <>
struct Dense<Code::int4> {
  static constexpr int64_t bytes = 16 * lanes / 2;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const I16 packed[2] = {iload(p), iload(p + 64)};
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, penjing::PENJING_ISA::code<4, 4 * (k.value % 8)>(packed[k.value / 8]));
    });
  }
};

// The same with 24 bits a lane, their bytes in three planes.
template <>
struct Dense<Code::int3> {
  static constexpr int64_t bytes = 16 * lanes * 3 / 8;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const auto half = [](const uint8_t *q) {
      return ior(iload_bytes(q), ior(shift_left<8>(iload_bytes(q + 16)), shift_left<16>(iload_bytes(q + 32))));
    };
    const I16 packed[2] = {half(p), half(p + 48)};
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, penjing::PENJING_ISA::code<3, 3 * (k.value % 8)>(packed[k.value / 8]));
    });
  }
};

template <>
struct Dense<Code::int2> {
  static constexpr int64_t bytes = 16 * lanes / 4;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const I16 packed = iload(p);
    unroll<16>([&](auto k)
                   __attribute__((always_inline)) { use(k, penjing::PENJING_ISA::code<2, 2 * k.value>(packed)); });
  }
};

// Sparse: only what the mask has, spread over the lanes in registers. block() moves p past what it took.
template <Code code>
struct Sparse;

template <>
struct Sparse<Code::f32> {
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *&p, const uint16_t *mask, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, expand_floats(reinterpret_cast<const float *>(p), mask[k.value]));
      p += 4 * __builtin_popcount(mask[k.value]);
    });
  }
};

template <>
struct Sparse<Code::bf16> {
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *&p, const uint16_t *mask, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, expand_bf16(reinterpret_cast<const uint16_t *>(p), mask[k.value]));
      p += 2 * __builtin_popcount(mask[k.value]);
    });
  }
};

template <>
struct Sparse<Code::f16> {
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *&p, const uint16_t *mask, Use &&use) {
    unroll<16>([&](auto k) __attribute__((always_inline)) {
      use(k, expand_f16(reinterpret_cast<const uint16_t *>(p), mask[k.value]));
      p += 2 * __builtin_popcount(mask[k.value]);
    });
  }
};

PENJING_INLINE uint64_t four_columns(const uint16_t *mask) {
  uint64_t bits;
  std::memcpy(&bits, mask, sizeof bits);
  return bits;
}

template <int quarter, class Use>
PENJING_INLINE void use_columns(const Codes &codes, Use &&use) {
  unroll<4>([&](auto k) __attribute__((always_inline)) {
    use(Constant<4 * quarter + decltype(k)::value>{}, column<decltype(k)::value>(codes));
  });
}

template <>
struct Sparse<Code::int8> {
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *&p, const uint16_t *mask, Use &&use) {
    unroll<4>([&](auto quarter) __attribute__((always_inline)) {
      const uint64_t bits = four_columns(mask + 4 * quarter.value);
      const Codes codes = expand_bytes(reinterpret_cast<const int8_t *>(p), bits);
      p += __builtin_popcountll(bits);
      use_columns<decltype(quarter)::value>(codes, use);
    });
  }
};

// Kept nibbles follow each other; each four columns begin at a whole byte.
template <>
struct Sparse<Code::int4> {
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *&p, const uint16_t *mask, Use &&use) {
    unroll<4>([&](auto quarter) __attribute__((always_inline)) {
      const uint64_t bits = four_columns(mask + 4 * quarter.value);
      const Codes codes = expand_nibbles(p, bits);
      p += (__builtin_popcountll(bits) + 1) / 2;
      use_columns<decltype(quarter)::value>(codes, use);
    });
  }
};

// Walks along one panel.
template <Code code_, bool sparse, bool affine>
struct Decoder {
  const FloatWeight &w;
  int64_t panel, group_size;
  const uint8_t *p;
  const uint16_t *mask;
  F16 scale, zero_point;

  PENJING_INLINE Decoder(const FloatWeight &weight, int64_t index) : w(weight), panel(index) {
    p = w.values + (sparse ? w.begin[panel] : panel * w.panel_bytes);
    mask = sparse ? w.mask + panel * w.columns : nullptr;
    group_size = w.columns / w.groups;
    scale = zero_point = zero();
  }

  PENJING_INLINE bool scaled() const { return code_ > Code::f16; }

  PENJING_INLINE void start_group(int64_t group) {
    const int64_t at = (panel * w.groups + group) * lanes;
    if (scaled())
      scale = w.scale16 ? from_bf16(w.scale16 + at) : load(w.scale + at);
    if constexpr (affine)
      zero_point = from_int8(w.zero_point + at);
  }

  // use(column, code − zero point) for the next sixteen columns.
  template <class Use>
  PENJING_INLINE void block(Use &&use) {
    if constexpr (sparse) {
      const uint16_t *bits = mask;
      Sparse<code_>::block(p, bits, [&](auto k, F16 v) __attribute__((always_inline)) {
        use(k, affine ? keep(bits[k.value], sub(v, zero_point)) : v);
      });
      mask += 16;
    } else {
      Dense<code_>::block(p, [&](auto k, F16 v)
                                 __attribute__((always_inline)) { use(k, affine ? sub(v, zero_point) : v); });
      p += Dense<code_>::bytes;
    }
  }

  // The numbers in columns [column, column + columns), [column][16]; to be called in order. Never inlined: many call
  // it, and every copy is large.
  __attribute__((noinline)) void values(int64_t column, int64_t columns, float *out) {
    for (int64_t k = 0; k < columns; k += 16, out += 16 * lanes) {
      start_group((column + k) / group_size);
      block([&](auto c, F16 v)
                __attribute__((always_inline)) { store(out + c.value * lanes, scaled() ? mul(v, scale) : v); });
    }
  }
};

template <class D>
struct Kind {
  using Decoder = D;
};

template <Code code, bool sparse, class Use>
PENJING_INLINE void with_code(const FloatWeight &w, Use &&use) {
  if constexpr (code <= Code::f16)
    use(Kind<Decoder<code, sparse, false>>{});
  else if (w.zero_point)
    use(Kind<Decoder<code, sparse, true>>{});
  else
    use(Kind<Decoder<code, sparse, false>>{});
}

// Calls use with the decoder of the weight's code.
template <class Use>
PENJING_INLINE void with_decoder(const FloatWeight &w, Use &&use) {
  switch (w.code) {
  case Code::f32: return w.mask ? with_code<Code::f32, true>(w, use) : with_code<Code::f32, false>(w, use);
  case Code::bf16: return w.mask ? with_code<Code::bf16, true>(w, use) : with_code<Code::bf16, false>(w, use);
  case Code::f16: return w.mask ? with_code<Code::f16, true>(w, use) : with_code<Code::f16, false>(w, use);
  case Code::int8: return w.mask ? with_code<Code::int8, true>(w, use) : with_code<Code::int8, false>(w, use);
  case Code::int4: return w.mask ? with_code<Code::int4, true>(w, use) : with_code<Code::int4, false>(w, use);
  case Code::int3: return with_code<Code::int3, false>(w, use);
  case Code::int2: return with_code<Code::int2, false>(w, use);
  }
}

} // namespace penjing::PENJING_ISA
