// What a kernel is given, and the table of kernels of each instruction set.
//
// Weights (out, in) lie in panels of sixteen rows: all columns of a panel follow each other, sixteen rows at a time,
// so that one vector holds a column's weights of sixteen outputs. Missing rows of the last panel are zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/settle.h"
#include "kernels/cached.h"
#include "kernels/group.h"

namespace penjing {

constexpr int lanes = 16;

enum class Code { f32, bf16, f16, int8, int4, int3, int2 };

// A weight for float activations. Columns are padded with zeros so that each group is a multiple of sixteen.
struct FloatWeight {
  Code code;
  int64_t rows, columns, groups;
  const uint8_t *values;
  int64_t panel_bytes;      // dense: from panel to panel
  const uint16_t *mask;     // sparse: [panel][column], bit i for row i; else null
  const int64_t *begin;     // sparse: where each panel's values begin, in bytes
  const float *scale;       // [panel][group][16], or null
  const uint16_t *scale16;  // the same as bfloat16, where that is exact; or null
  const int8_t *zero_point; // [panel][group][16], or null
};

// y (m, rows) = x (m, columns) · weightᵀ + bias, for rows [row_begin, row_end) of x and some panels of the weight.
struct FloatProduct {
  const FloatWeight *weight;
  const float *x, *bias;
  float *y;
  int64_t y_stride;
};

// A weight for integer activations: [panel][quad][16 rows × 4 columns] of signed bytes.
struct Int8Weight {
  int64_t rows, quads;
  int64_t columns; // the true ones
  const int8_t *values;
  const int32_t *sum;        // [panel][16]: of (code − zero point) over the true columns
  const int32_t *zero_point; // [panel][16], or null
};

// sums[r][n] = Σ (x − zero[r]) (w − zero_point[n]), exactly; y = ((float)sum · step[r]) · scale[n] + bias[n], then
// ReLU. x holds unsigned bytes; bytes beyond the true columns are 0. Row r begins at x + row_offset[r] (or r · 4 ·
// quads), and quad q of it at quad_offset[q] (or 4 · q) from there: with offsets this is a convolution.
struct Int8Product {
  const Int8Weight *weight;
  const uint8_t *x;
  const int32_t *row_offset, *quad_offset; // or null
  const int32_t *zero;                     // of x, as unsigned; [row · x_stride]
  const float *step;                       // [row · x_stride]
  int64_t x_stride;                        // 1: per row, 0: one for all
  const float *scale, *bias;               // [panel][16]; bias or null
  bool relu;
  float *y;      // or null when only the sums are wanted
  int32_t *sums; // or null
  int64_t row_stride, output_stride;
};

constexpr int64_t softmax_block = 64; // logits that are summed and searched together

// A logit weighs e^((logit − greatest) · inverse), in float64; what would weigh less than `least` weighs nothing.
struct Softmax {
  double greatest, inverse /* of the temperature */, least;
};

enum class Float { f32, bf16, f16 };

struct Kernels {
  void (*float_product)(const FloatProduct &, int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                        int64_t row_end);
  void (*decode_panel)(const FloatWeight &, int64_t panel, float *values /* [column][16] */);
  void (*int8_product)(const Int8Product &, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end);
  // See group.h. scratch: group_scratch bytes, aligned to a cache line.
  void (*group_product)(const GroupProduct &, int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                        int64_t row_end, uint8_t *scratch);
  void (*group_panel)(const GroupWeight &, int64_t panel, uint8_t *codes /* [quad][16][4] */);
  // A row of x: of each segment step = absmax / span, codes = clamp(round(x / step), least_code, 127), and −Σ codes.
  void (*encode_segments)(const float *x, int64_t columns, const Segments &, float span, float least_code,
                          int8_t *codes, float *step, int32_t *minus_sum);

  // See cached.h. Rows are (query, head of the group), in that order; scratch: cached_scratch floats.
  void (*attend_cached)(const CachedAttention &, int64_t row_begin, int64_t row_end, float *scratch);
  // One position of a head: its key and value into the head's part of a block.
  void (*write_cached)(const KvHead &, uint8_t *part, int position, const float *key, const float *value);

  // The greatest of each block of logits; false, and anything there, unless all are finite.
  bool (*block_maxima)(const float *x, int64_t n, float *maxima);
  // What each logit weighs, and what each block of them does.
  void (*softmax_weights)(const float *x, int64_t n, const Softmax &, double *weights);
  void (*softmax_sums)(const float *x, int64_t n, const Softmax &, double *sums);

  // Smallest and largest of n floats and 0.
  void (*range)(const float *x, int64_t n, float *low, float *high);
  // codes[i] = clamp(round(x[i] · inverse + zero), −128, 127) + 128.
  void (*encode_bytes)(const float *x, int64_t n, float inverse, float zero, uint8_t *codes);
  // The same for up to four planes of n floats (null: byte 0), interleaved: byte 4·i + c is plane c's.
  void (*encode_quads)(const float *const planes[4], int64_t n, float inverse, float zero, uint8_t *codes);

  void (*to_float)(const void *x, Float type, int64_t n, float *y);
  // Smallest and largest of each group of columns, 0 included.
  void (*group_ranges)(const float *x, int64_t groups, int64_t group, float *low, float *high);
  // codes = clamp(round(x · inverse + zero), qmin, qmax), with one inverse and zero a group.
  void (*encode_groups)(const float *x, int64_t groups, int64_t group, const float *inverse, const float *zero,
                        float qmin, float qmax, int8_t *codes);
  // n codes, 2 to 8 bits, as a stream of bits; n a multiple of 8.
  void (*pack)(const int8_t *codes, int64_t n, int bits, uint8_t *stream);
  void (*unpack)(const uint8_t *stream, int64_t n, int bits, int8_t *codes);
  bool (*has_nonfinite)(const void *x, Float type, int64_t n);
  // Bits and kept values of one row; what is zero under `significant` (all bits but a float's sign) is not kept.
  int64_t (*compress)(const void *row, int64_t n, int width, uint32_t significant, uint8_t *bitmask, void *kept);
  int64_t (*expand)(const void *kept, const uint8_t *bitmask, int64_t n, int width, void *row);
  // See settle.h. Some outputs: at most settle_width of them, or 16.
  void (*settle_outputs)(const Columns &, int64_t first, int64_t count);
  void (*search_outputs)(const StepSearch &, int64_t first, int count);
};

const Kernels &kernels(); // of the instruction set in use

} // namespace penjing
