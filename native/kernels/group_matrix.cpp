// Weights for integer activations: how they are packed, and how a product is divided.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/group_pack.h"
#include "kernels/matrix.h"
#include "kernels/stored.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t line = 64, vector = 64;

GroupCode code_of(int bits, bool sparse) {
  if (sparse)
    return bits > 4 ? GroupCode::sparse8 : GroupCode::sparse4;
  constexpr GroupCode dense[] = {GroupCode::int2, GroupCode::int3, GroupCode::int4};
  return bits > 4 ? GroupCode::int8 : dense[bits - 2];
}

// Are at most two of each four codes kept, in groups that need no padding and have no zeros of their own?
bool fits_pairs(const Codes &c) {
  if (c.bits != 4 || c.zero_point || c.columns / c.groups % group_columns != 0)
    return false;
  for (int64_t i = 0; i < c.rows * c.columns; i += 4) {
    const int8_t *four = c.codes + i;
    if ((four[0] != 0) + (four[1] != 0) + (four[2] != 0) + (four[3] != 0) > 2)
      return false;
  }
  return true;
}

Segments cut(int64_t group, GroupCode code, bool per_row) {
  const int64_t unit = 4 * packed_quads(code);
  const int64_t parts = per_row ? 1 : (group + group_columns - 1) / group_columns;
  return {group, parts, round_up((group + parts - 1) / parts, unit)};
}

// What a matrix is packed from: codes as unsigned bytes, and the float that a step is.
struct CodesSource {
  const Codes &c;
  int offset() const { return 1 << ((c.bits > 4 ? 8 : c.bits) - 1); }
  bool affine() const { return c.zero_point; }
  uint8_t zero(int64_t row, int64_t group) const {
    return static_cast<uint8_t>(offset() + (affine() ? c.zero_point[row * c.groups + group] : 0));
  }
  float scale(int64_t row, int64_t group) const { return c.scale[row * c.groups + group]; }
  void read(int64_t row, int64_t column, int64_t count, uint8_t *out) const {
    const int8_t *from = c.codes + row * c.columns + column;
    const int add = offset();
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<uint8_t>(from[i] + add);
  }
};

struct Mxfp4Source {
  const uint8_t *blocks, *exponent;
  int64_t columns;
  static constexpr bool affine() { return false; }
  static constexpr uint8_t zero(int64_t, int64_t) { return 0; } // the code of +0
  // Half of 2^(exponent − 127), because the codes stand for twice their value; 255 is a NaN.
  float scale(int64_t row, int64_t group) const {
    const int e = exponent[row * (columns / 32) + group];
    return e == 255 ? NAN : std::ldexp(1.0f, e - 128);
  }
  void read(int64_t row, int64_t column, int64_t count, uint8_t *out) const {
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<uint8_t>(blocks[(row * columns + column + i) / 2] >> 4 * ((column + i) & 1) & 15);
  }
};

class GroupMatrix final : public Matrix {
public:
  template <class Source>
  GroupMatrix(const Source &source, int64_t rows, int64_t columns, int64_t groups, GroupCode code, uint8_t zero,
              bool per_row)
      : GroupMatrix(rows, columns, groups, code, zero, per_row) {
    steps(!scales_are_bfloat16(source), source.affine());
    if (has_masks())
      pack_kept(source);
    else
      pack_all(source);
    w_.panels = panels_.data();
  }

  // The numbers: groups, code, zero, per row, wide steps, zero points. The arrays: panels, where they begin.
  explicit GroupMatrix(const StoredReader &in)
      : GroupMatrix(in.header().rows, in.header().columns, in.number(0, 1, in.header().columns),
                    static_cast<GroupCode>(in.number(1, 0, static_cast<int64_t>(GroupCode::pairs4))),
                    static_cast<uint8_t>(in.number(2, 0, 255)), in.number(3, 0, 1)) {
    const bool affine = in.number(5, 0, 1);
    in.check(columns % w_.groups == 0, "groups that do not divide its columns");
    in.check(!w_.per_row || w_.groups == 1, "one step a row, but many groups");
    in.check(w_.code != GroupCode::mxfp4 || (columns == 32 * w_.groups && !affine), "groups that MXFP4 has not");
    steps(in.number(4, 0, 1), affine);
    in.check(w_.code != GroupCode::pairs4 || (segments_.group % group_columns == 0 && !affine && !w_.per_row),
             "groups that two of four have not");
    if (has_masks()) {
      panels_ = in.bytes(0);
      begin_ = in.array<int64_t>(1, panels());
      in.check(panels_follow(), "panels that do not follow each other");
      w_.begin = begin_.data();
    } else {
      w_.panel_bytes = dense_panel();
      panels_ = in.array<uint8_t>(0, panels() * w_.panel_bytes);
      in.array<int64_t>(1, 0);
    }
    w_.panels = panels_.data();
  }

  Stored stored() const override {
    Stored s{{Stock::groups,
              rows,
              columns,
              {w_.groups, static_cast<int64_t>(w_.code), w_.zero, w_.per_row, w_.wide_scale, w_.zero_bytes > 0},
              {}}};
    s.add(0, panels_);
    s.add(1, begin_);
    return s;
  }

  void decode(const int64_t *wanted, int64_t count, float *out) const override {
    struct Unpacked;
    parallel_for((count + lanes - 1) / lanes, [&](int64_t part) {
      uint8_t *codes = scratch<uint8_t, Unpacked>(w_.row_quads() * vector);
      int64_t have = -1;
      for (int64_t i = part * lanes; i < std::min(count, (part + 1) * lanes); ++i) {
        if (const int64_t panel = wanted[i] / lanes; panel != have)
          kernels().group_panel(w_, have = panel, codes);
        decode_row(wanted[i], codes, out + i * columns);
      }
    });
  }

  int64_t bytes() const override { return panels_.bytes() + begin_.bytes(); }

  std::string layout() const override {
    constexpr const char *names[] = {"int8", "int4", "int3", "int2", "mxfp4", "int8", "int4", "int4"};
    return std::string(names[static_cast<int>(w_.code)]) + (w_.per_row ? "-int8" : "-int8-groups") +
           (w_.begin                       ? "-sparse"
            : w_.code == GroupCode::pairs4 ? "-2:4"
                                           : "");
  }

protected:
  void prepare(const Rows &x) const override { coded(x); }

  int64_t pieces(int64_t m) const override { return division(m).panel_pieces * division(m).row_pieces; }

  void piece(const Rows &x, const Product &p, int64_t index) const override {
    struct Results;
    const Division d = division(x.m());
    const int64_t panel = index / d.row_pieces * d.panel_block, row = index % d.row_pieces * d.row_block;
    if (row >= x.m())
      return;
    const int64_t row_end = std::min(row + d.row_block, x.m());
    const GroupProduct product{&w_, coded(x), p.bias, p.y, p.y_stride};
    kernels().group_product(product, panel, std::min(panel + d.panel_block, panels()), row, row_end,
                            scratch<uint8_t, Results>(group_scratch(row_end - row)));
  }

private:
  GroupMatrix(int64_t rows, int64_t columns, int64_t groups, GroupCode code, uint8_t zero, bool per_row)
      : Matrix(rows, columns), segments_(cut(columns / groups, code, per_row)), span_(per_row ? 127.5f : 127.0f) {
    w_.code = code;
    w_.rows = rows;
    w_.groups = groups;
    w_.parts = segments_.parts;
    w_.quads = segments_.length / 4;
    w_.per_row = per_row;
    w_.zero = zero;
  }

  bool has_masks() const { return w_.code == GroupCode::sparse8 || w_.code == GroupCode::sparse4; }

  void steps(bool wide, bool affine) {
    w_.wide_scale = wide;
    w_.scale_bytes = round_up(w_.groups * lanes * (wide ? 4 : 2), line);
    w_.zero_bytes = affine ? round_up(w_.groups * lanes, line) : 0;
  }

  int64_t panels() const { return (rows + lanes - 1) / lanes; }
  int64_t dense_panel() const { return w_.scale_bytes + w_.zero_bytes + packed_bytes(w_.code, w_.row_quads()); }

  // Does each sparse panel end, by its masks, where the next begins?
  bool panels_follow() const {
    int64_t at = 0;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      if (begin_[panel] != at)
        return false;
      at += w_.scale_bytes + w_.zero_bytes;
      for (int64_t segment = 0; segment < w_.groups * w_.parts; ++segment) {
        const int64_t masks = at;
        if ((at += 8 * w_.quads) > panels_.size())
          return false;
        for (int64_t q = 0; q < w_.quads; ++q) {
          uint64_t mask;
          std::memcpy(&mask, panels_.data() + masks + 8 * q, 8);
          const int kept = std::popcount(mask);
          at += w_.code == GroupCode::sparse4 ? (kept + 1) / 2 : kept;
        }
      }
      if ((at = round_up(at, line)) > panels_.size())
        return false;
    }
    return at == panels_.size();
  }

  // Parts that follow each other without padding are so many groups: matrices of any group size share them.
  CodedRows coded(const Rows &x) const {
    const Segments &s = segments_;
    return x.codes(s.group == s.parts * s.length ? Segments{s.length, 1, s.length} : s, span_);
  }

  // Few rows: runs of panels long enough for the memory's sake, and many enough for threads to end together. Many:
  // four panels and all rows, or blocks of rows when there are not enough panels to share.
  struct Division {
    int64_t panel_block, panel_pieces, row_block, row_pieces;
  };
  Division division(int64_t m) const {
    const int64_t team = threads();
    const bool few = m <= (w_.begin || w_.code == GroupCode::pairs4 ? group_few / 2 : group_few);
    const int64_t block = few ? std::max<int64_t>(1, panels() / (8 * team)) : group_tile_panels;
    const int64_t pieces = (panels() + block - 1) / block;
    const int64_t row_pieces = few ? 1 : std::clamp<int64_t>(4 * team / pieces, 1, (m + 47) / 48);
    return {block, pieces, round_up((m + row_pieces - 1) / row_pieces, 12), row_pieces};
  }

  template <class Source>
  bool scales_are_bfloat16(const Source &source) const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t g = 0; g < w_.groups; ++g)
        if (__builtin_bit_cast(uint32_t, source.scale(row, g)) & 0xffff)
          return false;
    return true;
  }

  // A panel's steps and zeros, where missing rows have the step 0.
  template <class Source>
  void pack_steps(const Source &source, int64_t panel, uint8_t *out) const {
    std::memset(out, 0, static_cast<size_t>(w_.scale_bytes + w_.zero_bytes));
    for (int64_t g = 0; g < w_.groups; ++g)
      for (int64_t lane = 0; lane < lanes && panel * lanes + lane < rows; ++lane) {
        const auto bits = __builtin_bit_cast(uint32_t, source.scale(panel * lanes + lane, g));
        const auto high = static_cast<uint16_t>(bits >> 16);
        const int64_t at = g * lanes + lane;
        w_.wide_scale ? std::memcpy(out + 4 * at, &bits, 4) : std::memcpy(out + 2 * at, &high, 2);
        if (w_.zero_bytes)
          out[w_.scale_bytes + at] = source.zero(panel * lanes + lane, g);
      }
  }

  // A panel's codes, [quad][16][4]; what is padding has the zero's.
  template <class Source>
  void gather(const Source &source, int64_t panel, uint8_t *quads) const {
    struct Row;
    const int64_t size = w_.row_quads() * 4, group = segments_.group, part = segments_.length;
    uint8_t *row = scratch<uint8_t, Row>(size);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = panel * lanes + lane;
      if (at >= rows)
        std::memset(row, w_.zero_bytes ? 0 : w_.zero, static_cast<size_t>(size));
      else if (group == w_.parts * part)
        source.read(at, 0, columns, row);
      else
        for (int64_t g = 0; g < w_.groups; ++g) {
          uint8_t *out = row + g * w_.parts * part;
          source.read(at, g * group, group, out);
          std::memset(out + group, source.zero(at, g), static_cast<size_t>(w_.parts * part - group));
        }
      for (int64_t q = 0; q < size / 4; ++q)
        std::memcpy(quads + q * vector + lane * 4, row + 4 * q, 4);
    }
  }

  template <class Source>
  void pack_all(const Source &source) {
    w_.panel_bytes = dense_panel();
    panels_ = Buffer<uint8_t>(panels() * w_.panel_bytes);
    parallel_for(panels(), [&](int64_t panel) {
      struct Quads;
      uint8_t *quads = scratch<uint8_t, Quads>(w_.row_quads() * vector);
      uint8_t *out = panels_.data() + panel * w_.panel_bytes;
      pack_steps(source, panel, out);
      gather(source, panel, quads);
      pack_dense(w_.code, quads, w_.row_quads(), out + w_.scale_bytes + w_.zero_bytes);
    });
  }

  template <class Source>
  void pack_kept(const Source &source) {
    std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(panels()));
    parallel_for(panels(), [&](int64_t panel) {
      struct Quads;
      uint8_t *quads = scratch<uint8_t, Quads>(w_.row_quads() * vector);
      const int64_t steps = w_.scale_bytes + w_.zero_bytes;
      std::vector<uint8_t> &bytes = packed[panel];
      bytes.resize(static_cast<size_t>(steps + w_.row_quads() * 72));
      pack_steps(source, panel, bytes.data());
      gather(source, panel, quads);
      int64_t end = steps;
      for (int64_t g = 0; g < w_.groups; ++g) {
        uint8_t zero[lanes];
        for (int lane = 0; lane < lanes; ++lane)
          zero[lane] = w_.zero_bytes ? bytes[w_.scale_bytes + g * lanes + lane] : w_.zero;
        for (int64_t part = 0; part < w_.parts; ++part, quads += w_.quads * vector)
          end += pack_sparse(w_.code, quads, w_.quads, zero, bytes.data() + end);
      }
      bytes.resize(static_cast<size_t>(round_up(end, line)));
      bytes.shrink_to_fit();
    });
    begin_ = Buffer<int64_t>(panels());
    int64_t total = 0;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      begin_[panel] = total;
      total += static_cast<int64_t>(packed[panel].size());
    }
    panels_ = Buffer<uint8_t>(total);
    parallel_for(panels(), [&](int64_t panel) {
      std::copy(packed[panel].begin(), packed[panel].end(), panels_.data() + begin_[panel]);
    });
    w_.begin = begin_.data();
  }

  void decode_row(int64_t row, const uint8_t *codes, float *out) const {
    const int64_t panel = row / lanes, lane = row % lanes;
    const uint8_t *steps = panels_.data() + (w_.begin ? begin_[panel] : panel * w_.panel_bytes);
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t at = g * lanes + lane;
      uint16_t high;
      float scale;
      if (w_.wide_scale)
        std::memcpy(&scale, steps + 4 * at, 4);
      else
        std::memcpy(&high, steps + 2 * at, 2), scale = __builtin_bit_cast(float, static_cast<uint32_t>(high) << 16);
      const int zero = w_.zero_bytes ? steps[w_.scale_bytes + at] : w_.zero;
      const uint8_t *group = codes + g * w_.parts * w_.quads * vector + lane * 4;
      for (int64_t k = 0; k < segments_.group; ++k)
        *out++ = static_cast<float>(group[k / 4 * vector + k % 4] - zero) * scale;
    }
  }

  Segments segments_;
  float span_;
  GroupWeight w_{};
  Buffer<uint8_t> panels_;
  Buffer<int64_t> begin_;
};

} // namespace

std::unique_ptr<Matrix> group_matrix(const Codes &c, bool per_row, bool sparse) {
  const CodesSource source{c};
  const GroupCode code = sparse && !per_row && fits_pairs(c) ? GroupCode::pairs4 : code_of(c.bits, sparse);
  return std::make_unique<GroupMatrix>(source, c.rows, c.columns, c.groups, code, static_cast<uint8_t>(source.offset()),
                                       per_row);
}

std::unique_ptr<Matrix> mxfp4_matrix(const uint8_t *blocks, const uint8_t *scale, int64_t rows, int64_t columns) {
  const Mxfp4Source source{blocks, scale, columns};
  return std::make_unique<GroupMatrix>(source, rows, columns, columns / 32, GroupCode::mxfp4, uint8_t{12}, false);
}

std::unique_ptr<Matrix> restored_groups(const StoredReader &reader) { return std::make_unique<GroupMatrix>(reader); }

} // namespace penjing
