// Rotary positions of one token's heads.
#include "decoder/elements.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

void turn_halves(float *x, const float *cosine, const float *sine, int64_t pairs) {
  float *second = x + pairs;
  int64_t i = 0;
  for (; i + 16 <= pairs; i += 16) {
    const F16 a = load(x + i), b = load(second + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(second + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < pairs; ++i) {
    const float a = x[i], b = second[i];
    x[i] = a * cosine[i] - b * sine[i];
    second[i] = b * cosine[i] + a * sine[i];
  }
}

void turn_neighbours(float *x, const float *cosine, const float *sine, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

} // namespace

void rotate(float *x, int64_t heads, int64_t stride, const float *cosine, const float *sine, int64_t pairs,
            bool interleaved) {
  for (int64_t head = 0; head < heads; ++head, x += stride)
    interleaved ? turn_neighbours(x, cosine, sine, pairs) : turn_halves(x, cosine, sine, pairs);
}

} // namespace penjing::PENJING_ISA
