// See settle.h. Products and sums are rounded one by one, so that codes are the same on every machine.
#include <algorithm>
#include <cmath>
#include <vector>

#include "formats/floats.h"
#include "formats/settle.h"
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr int64_t block = 128;  // columns that are summed in float32; blocks are summed in float64
constexpr int64_t copied = 512; // up to so many columns, a group is copied to where its columns follow each other

PENJING_INLINE F16 load_some(const float *p, int n) { return n == 16 ? load(p) : load(p, n); }
PENJING_INLINE void store_some(float *p, F16 v, int n) { n == 16 ? store(p, v) : store(p, v, n); }

// Weights of sixteen outputs, or fewer, column by column; a stride of 0 is one number for all outputs.
struct Lanes {
  const float *at;
  int64_t stride;
  int n;
  bool splat_each;

  PENJING_INLINE F16 operator[](int64_t i) const { return splat_each ? splat(at[i]) : load_some(at + i * stride, n); }
};

Lanes copy(const Lanes &from, int64_t n, float *to) {
  for (int64_t i = 0; i < n; ++i)
    store(to + i * lanes, from[i]);
  return {to, lanes, lanes, false};
}

float stored_step(float step, Float type) {
  const float kept = type == Float::f32    ? step
                     : type == Float::bf16 ? penjing::from_bf16(to_bf16(step))
                                           : penjing::from_f16(to_f16(step));
  return kept > 0 && std::isfinite(kept) ? kept : 1.0f;
}

// The best step and zero point of sixteen outputs of those judged so far.
class Trials {
public:
  Trials(const StepSearch &search, const Lanes &values, const Lanes &importance)
      : search_(search), values_(values), importance_(importance) {}

  float scale[lanes], zero_point[lanes];

  float zero_for(float low, float step) const {
    if (search_.symmetric)
      return 0;
    return clamp(std::nearbyint(search_.least_code - low / step));
  }

  float clamp(float code) const { return std::min(std::max(code, search_.least_code), search_.greatest_code); }

  // Codes on those steps, and the best steps for those codes in closed form, kept where they gain most.
  void judge(const float *step, const float *zeros) {
    double along[lanes] = {}, power[lanes] = {};
    const F16 inverse = div(splat(1.0f), load(step)), moved = load(zeros);
    const F16 low = sub(splat(search_.least_code), moved), high = sub(splat(search_.greatest_code), moved);
    for (int64_t i = 0; i < search_.n; i += block) {
      F16 a = zero(), p = zero();
      for (int64_t k = i; k < std::min(i + block, search_.n); ++k) {
        const F16 value = values_[k], h = importance_[k];
        const F16 code = to_float(round(min(max(mul(value, inverse), low), high)));
        a = add(a, mul(mul(h, value), code));
        p = add(p, mul(mul(code, code), h));
      }
      float sums[2][lanes];
      store(sums[0], a);
      store(sums[1], p);
      for (int lane = 0; lane < lanes; ++lane) {
        along[lane] += sums[0][lane];
        power[lane] += sums[1][lane];
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      const float a = static_cast<float>(along[lane]), p = std::max(static_cast<float>(power[lane]), 1e-30f);
      const float gain = a * a / p;
      if (gain > gain_[lane] && a > 0) {
        gain_[lane] = gain;
        scale[lane] = stored_step(a / p, search_.stored);
        zero_point[lane] = zeros[lane];
      }
    }
  }

private:
  const StepSearch &search_;
  Lanes values_, importance_;
  float gain_[lanes] = {};
};

// All columns of 16 · parts outputs, or of n when there is one part.
template <int parts>
void settle_some(const Columns &c, int64_t first, int n) {
  for (int64_t i = 0; i < c.n; ++i) {
    const int64_t row = i * c.out + first;
    F16 best[parts];
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part)
      best[part] = load_some(c.base + row + part * lanes, n);
    for (int64_t j = 0; j < i; ++j) {
      const F16 share = splat(c.coupling[j * c.n + i]);
      const float *passed = c.error + j * c.out + first;
#pragma GCC unroll 4
      for (int part = 0; part < parts; ++part)
        best[part] = add(best[part], mul(share, load_some(passed + part * lanes, n)));
    }
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const int64_t at = row + part * lanes;
      uint32_t kept = c.kept ? 0 : 0xffff;
      for (int lane = 0; c.kept && lane < n; ++lane)
        kept |= static_cast<uint32_t>(c.kept[at + lane] != 0) << lane;
      F16 found = best[part];
      if (c.steps) {
        const int64_t step = c.steps->group[i] * c.out + first + part * lanes;
        found = mul(found, load_some(c.steps->inverse + step, n));
        found = min(max(found, load_some(c.steps->low + step, n)), load_some(c.steps->high + step, n));
        found = keep(kept, to_float(round(found)));
        float codes[lanes];
        store(codes, found);
        for (int lane = 0; lane < n; ++lane)
          c.codes[at + lane] = static_cast<int16_t>(codes[lane]);
        found = mul(found, load_some(c.steps->scale + step, n));
      } else {
        found = keep(kept, found);
      }
      store_some(c.error + at, sub(load_some(c.reference + at, n), found), n);
    }
  }
}

} // namespace

void settle_outputs(const Columns &c, int64_t first, int64_t count) {
  if (count == settle_width)
    return settle_some<settle_width / lanes>(c, first, lanes);
  for (int64_t at = 0; at < count; at += lanes)
    settle_some<1>(c, first + at, static_cast<int>(std::min<int64_t>(lanes, count - at)));
}

void search_outputs(const StepSearch &s, int64_t first, int count) {
  Lanes values{s.values + first, s.out, count, false};
  Lanes importance = s.each ? Lanes{s.importance + first, s.out, count, false} : Lanes{s.importance, 0, count, true};
  std::vector<float> copies;
  if (s.n <= copied) {
    copies.resize(static_cast<size_t>(2 * s.n * lanes));
    values = copy(values, s.n, copies.data());
    importance = copy(importance, s.n, copies.data() + s.n * lanes);
  }
  float low[lanes] = {}, high[lanes] = {}, reach[lanes];
  for (int64_t i = 0; i < s.n; ++i) {
    float value[lanes], h[lanes];
    store(value, values[i]);
    store(h, importance[i]);
    for (int lane = 0; lane < lanes; ++lane) { // what is of no importance does not count, not even for the range
      const float counted = h[lane] > 0 ? value[lane] : 0.0f;
      low[lane] = std::min(low[lane], counted);
      high[lane] = std::max(high[lane], counted);
    }
  }
  const float codes = s.greatest_code - s.least_code, span = s.symmetric ? codes / 2 : codes;
  Trials trials(s, values, importance);
  for (int lane = 0; lane < lanes; ++lane) {
    reach[lane] = s.symmetric ? std::max(-low[lane], high[lane]) : high[lane] - low[lane];
    trials.scale[lane] = stored_step(reach[lane] / span, s.stored);
    trials.zero_point[lane] = trials.zero_for(low[lane], trials.scale[lane]);
  }
  float step[lanes], zeros[lanes];
  for (int64_t i = 0; i < s.share_count; ++i) {
    for (int lane = 0; lane < lanes; ++lane) {
      step[lane] = std::max(reach[lane] * s.shares[i] / span, 1e-30f);
      zeros[lane] = trials.zero_for(low[lane] * s.shares[i], step[lane]);
    }
    trials.judge(step, zeros);
  }
  if (!s.symmetric) { // the ends need not shrink alike
    float scale[lanes], zero[lanes];
    std::copy_n(trials.scale, lanes, scale);
    std::copy_n(trials.zero_point, lanes, zero);
    for (const float moved : {-1.0f, 1.0f})
      for (int64_t i = 0; i < s.near_count; ++i) {
        for (int lane = 0; lane < lanes; ++lane) {
          step[lane] = scale[lane] * s.near[i];
          zeros[lane] = trials.clamp(zero[lane] + moved);
        }
        trials.judge(step, zeros);
      }
  }
  std::copy_n(trials.scale, count, s.scale + first);
  std::copy_n(trials.zero_point, count, s.zero + first);
}

} // namespace penjing::PENJING_ISA
