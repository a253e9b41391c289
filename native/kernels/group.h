// Weights and activations both as integers: unsigned bytes of the weight times signed bytes of x, a step for each
// segment of columns of both. Σ (w − zero) · x = Σ w · x − zero · Σ x, and Σ x belongs to the activations alone.
#pragma once

#include <cstdint>

namespace penjing {

constexpr int group_columns = 128; // that share a step of x, at most

// How columns are cut: groups of the weight in equal parts, each padded to `length` columns, a multiple of four.
struct Segments {
  int64_t group, parts, length;

  bool operator==(const Segments &) const = default;
};

// x as signed bytes: [row][segment][length], its padding zeros; a step and −Σ codes a segment.
struct CodedRows {
  const int8_t *codes;
  int64_t stride; // bytes from row to row
  const float *step;
  const int32_t *minus_sum;
  int64_t segments; // in a row
};

enum class GroupCode { int8, int4, int3, int2, mxfp4, sparse8, sparse4, pairs4 };

// Panels one after the other; each is [scale: group][16], [zero: group][16], both padded to cache lines, and its
// codes: [quad][16 rows][4 columns], packed as bytes.h says. Sparse: of each segment the masks of its quads, then the
// kept codes; what is not kept has the zero as its code. pairs4: two of each four codes are kept, so that all has a
// fixed length; the zero is one for all.
struct GroupWeight {
  GroupCode code;
  int64_t rows;
  int64_t groups, parts, quads;    // groups a row, segments a group, quads a segment
  int64_t scale_bytes, zero_bytes; // of a panel
  bool wide_scale;                 // float32 instead of bfloat16, which is used where it is exact
  bool per_row;                    // one step a row of x: sums are integers to the end, segments or not
  uint8_t zero;                    // of all, where zero_bytes == 0
  const uint8_t *panels;
  int64_t panel_bytes;  // dense: from panel to panel
  const int64_t *begin; // sparse: where each panel begins; else null

  int64_t row_quads() const { return groups * parts * quads; }
};

// y (m, rows) = x · weightᵀ + bias (or null). Of an output the segments are added in ascending order, whatever the
// number of rows: y = Σ (float)(Σ (w − zero) · x) · (step of x · step of w), or, per row, as IntegerLinear.
struct GroupProduct {
  const GroupWeight *weight;
  CodedRows x;
  const float *bias;
  float *y;
  int64_t y_stride;
};

// pairs4: 128 columns of a panel are 32 quads. Which two of a quad are kept, a and (a + 1 + d) % 4, takes the three
// bits a | d << 2; the places of 32 quads × 16 rows are 3 × 32 words of five such fields, [lane][quad of two], whose
// sixteenth bits are one more; the codes follow, 8 × 64 bytes of two nibbles. 2.75 bits a weight.
constexpr int pair_quads = 32, pair_place_bytes = 192;
constexpr uint8_t pair_zero = 8;

constexpr int64_t group_few = 16; // up to so many rows weights are unpacked in registers, for half as many at a time
constexpr int64_t group_tile_panels = 4; // that are computed together when rows are many
// Bytes that group_product needs for so many rows.
constexpr int64_t group_scratch(int64_t rows) {
  return (group_columns * group_tile_panels + rows * group_tile_panels) * 64;
}

} // namespace penjing
