// What a decoder does with rows of floats besides multiplying them with weights, and the table of these functions of
// each instruction set. A row's result depends on nothing but the row.
#pragma once

#include <cstdint>

namespace penjing {

enum class Activation { silu, gelu, gelu_tanh, clamped };

struct Elements {
  // y = x · factor / √(mean(x²) + eps) · weight (or null).  Zhang and Sennrich, arXiv 1910.07467.
  void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float factor, float *y);
  // y = (x − mean) / √(variance + eps) · weight + bias (each or null).  Ba et al., arXiv 1607.06450.
  void (*layer_norm)(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *y);

  // In place: turns pairs of each head's first elements by angles of the given cosine and sine (pairs). A pair is
  // elements i and i + pairs, or 2i and 2i + 1 where they are interleaved.  Su et al., arXiv 2104.09864.
  void (*rotate)(float *x, int64_t heads, int64_t stride, const float *cosine, const float *sine, int64_t pairs,
                 bool interleaved);

  // y = activation(gate) · up, or without up activation(gate). clamped (gpt-oss): gate is cut at limit and up at
  // ±limit; (up + 1) · gate · sigmoid(alpha · gate).
  void (*activate)(Activation kind, const float *gate, const float *up, int64_t n, float limit, float alpha, float *y);
  // y ← y · sigmoid(gate).
  void (*gate)(const float *gate, int64_t n, float *y);
  // y ← y + factor · x.
  void (*add)(const float *x, float factor, int64_t n, float *y);
  void (*multiply)(float factor, int64_t n, float *y);
  // y ← cap · tanh(y / cap).
  void (*softcap)(float cap, int64_t n, float *y);
  bool (*finite)(const float *x, int64_t n);

  // y[c] = silu(Σ weight[j][c] · rows[j][c]) over `taps` rows.
  void (*convolve)(const float *const *rows, const float *weight, int64_t taps, int64_t channels, float *y);
  // One step of the gated delta rule (Yang et al., arXiv 2412.06464) on a state S (keys, values), in place:
  // S ← decay · S; S ← S + key ⊗ beta (value − keyᵀ S); y = queryᵀ S.
  void (*delta)(float *state, const float *query, const float *key, const float *value, float decay, float beta,
                int64_t keys, int64_t values, float *y);
};

const Elements &elements(); // of the instruction set in use

} // namespace penjing
