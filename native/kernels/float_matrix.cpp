// Weights of any layout for float activations: how they are packed, and how a product is divided.
#include "kernels/matrix.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "kernels/stored.h"
#include "runtime/buffer.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int bits_of(Code code) {
  constexpr int bits[] = {32, 16, 16, 8, 4, 3, 2};
  return bits[static_cast<int>(code)];
}

Code code_of(int bits, bool sparse) {
  if (bits > 4)
    return Code::int8;
  return bits == 4 || sparse ? Code::int4 : bits == 3 ? Code::int3 : Code::int2;
}

// One panel's raw values, [column][16], with columns padded and rows missing at the end as zeros.
struct PanelSource {
  int64_t rows, group, padded_group, groups;

  int64_t columns() const { return groups * padded_group; }

  // Calls set(column, lane, source index) for every true value of the panel.
  template <class Set>
  void each(int64_t panel, Set &&set) const {
    const int64_t true_columns = groups * group;
    for (int lane = 0; lane < lanes && panel * lanes + lane < rows; ++lane)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t k = 0; k < group; ++k)
          set(g * padded_group + k, lane, (panel * lanes + lane) * true_columns + g * group + k);
  }
};

// Dense codes of eight columns and sixteen rows: each row's `bits`-bit fields in one lane, its bytes in planes
// (3 bits) or as one word.
void pack_codes(const int8_t *codes, int64_t columns, int bits, uint8_t *out) {
  const int per_lane = bits == 2 ? 16 : 8;
  for (int64_t k = 0; k < columns; k += per_lane) {
    for (int lane = 0; lane < lanes; ++lane) {
      uint32_t word = 0;
      for (int j = 0; j < per_lane; ++j)
        word |= (static_cast<uint32_t>(codes[(k + j) * lanes + lane] + (1 << (bits - 1)))) << (bits * j);
      if (bits == 3)
        for (int byte = 0; byte < 3; ++byte)
          out[byte * lanes + lane] = static_cast<uint8_t>(word >> 8 * byte);
      else
        std::memcpy(out + lane * 4, &word, sizeof word);
    }
    out += lanes * per_lane * bits / 8;
  }
}

class FloatMatrix final : public Matrix {
public:
  FloatMatrix(Code code, int64_t rows, int64_t columns, int64_t groups)
      : Matrix(rows, columns), source_{rows, columns / groups, round_up(columns / groups, 16), groups} {
    weight_.code = code;
    weight_.rows = rows;
    weight_.columns = source_.columns();
    weight_.groups = groups;
  }

  // The numbers: code, groups. The arrays: values, mask, where panels begin, steps, steps as bfloat16, zero points.
  explicit FloatMatrix(const StoredReader &in)
      : FloatMatrix(static_cast<Code>(in.number(0, 0, static_cast<int64_t>(Code::int2))), in.header().rows,
                    in.header().columns, in.number(1, 1, in.header().columns)) {
    in.check(columns % source_.groups == 0, "groups that do not divide its columns");
    const int64_t panel = weight_.columns * lanes * bits_of(weight_.code) / 8, size = panels() * source_.groups * lanes;
    const bool sparse = in.has(1), coded = weight_.code >= Code::int8;
    values_ = sparse ? in.bytes(0) : in.array<uint8_t>(0, panels() * panel);
    if (sparse) {
      in.check(!coded || weight_.code <= Code::int4, "sparse codes that no kernel has");
      mask_ = in.array<uint16_t>(1, panels() * weight_.columns);
      begin_ = in.array<int64_t>(2, panels());
      in.check(panels_follow(), "panels that do not follow each other");
    } else {
      in.array<int64_t>(2, 0);
    }
    in.check(coded ? in.has(3) != in.has(4) : !in.has(3) && !in.has(4) && !in.has(5), "steps");
    scale_ = in.array<float>(3, in.has(3) ? size : 0);
    scale16_ = in.array<uint16_t>(4, in.has(4) ? size : 0);
    zero_point_ = in.array<int8_t>(5, in.has(5) ? size : 0);
    weight_.values = values_.data();
    weight_.panel_bytes = sparse ? 0 : panel;
    weight_.mask = mask_.data();
    weight_.begin = begin_.data();
    weight_.scale = scale_.data();
    weight_.scale16 = scale16_.data();
    weight_.zero_point = zero_point_.data();
  }

  Stored stored() const override {
    Stored s{{Stock::floats, rows, columns, {static_cast<int64_t>(weight_.code), source_.groups}, {}}};
    s.add(0, values_);
    s.add(1, mask_);
    s.add(2, begin_);
    s.add(3, scale_);
    s.add(4, scale16_);
    s.add(5, zero_point_);
    return s;
  }

  // T: float or uint16_t by the code.
  template <class T>
  void pack_floats(const T *values, bool sparse) {
    const T magnitude = static_cast<T>(~(T{1} << (8 * sizeof(T) - 1)));
    const int64_t size = weight_.columns * lanes;
    const auto fill = [&](int64_t panel, T *out) {
      std::memset(out, 0, static_cast<size_t>(size) * sizeof(T));
      source_.each(panel, [&](int64_t k, int lane, int64_t at) { out[k * lanes + lane] = values[at]; });
    };
    if (!sparse)
      return dense(size * static_cast<int64_t>(sizeof(T)),
                   [&](int64_t panel, uint8_t *out) { fill(panel, reinterpret_cast<T *>(out)); });
    pack_sparse([&](int64_t panel, uint16_t *mask, uint8_t *out) {
      std::vector<T> all(static_cast<size_t>(size));
      fill(panel, all.data());
      uint8_t *const begin = out;
      for (int64_t i = 0; i < size; ++i)
        if (all[i] & magnitude) {
          mask[i / lanes] |= static_cast<uint16_t>(1 << i % lanes);
          std::memcpy(out, &all[i], sizeof(T));
          out += sizeof(T);
        }
      return out - begin;
    });
  }

  void pack_codes(const Codes &c, bool sparse) {
    pack_steps(c);
    const int bits = bits_of(weight_.code);
    const int64_t size = weight_.columns * lanes;
    if (!sparse)
      return dense(size * bits / 8, [&](int64_t panel, uint8_t *out) {
        std::vector<int8_t> all(static_cast<size_t>(size));
        source_.each(panel, [&](int64_t k, int lane, int64_t at) { all[k * lanes + lane] = c.codes[at]; });
        if (bits == 8)
          std::memcpy(out, all.data(), all.size());
        else
          penjing::pack_codes(all.data(), weight_.columns, bits, out);
      });
    pack_sparse([&](int64_t panel, uint16_t *mask, uint8_t *out) {
      std::vector<int8_t> all(static_cast<size_t>(size));
      const int64_t true_columns = c.columns, group = source_.group;
      source_.each(panel, [&](int64_t k, int lane, int64_t at) {
        const int64_t step = at / true_columns * c.groups + at % true_columns / group;
        all[k * lanes + lane] = c.codes[at];
        if (c.codes[at] != (c.zero_point ? c.zero_point[step] : 0))
          mask[k] |= static_cast<uint16_t>(1 << lane);
      });
      return bits == 8 ? keep_bytes(all, mask, out) : keep_nibbles(all, mask, out);
    });
  }

  void multiply_panels(const Rows &x, const std::vector<int64_t> &wanted, float *y, int64_t y_stride) const override {
    const FloatProduct product{&weight_, x.padded(source_.group, source_.padded_group), nullptr, y, y_stride};
    parallel_for(static_cast<int64_t>(wanted.size()), [&](int64_t i) {
      const int64_t panel = wanted[static_cast<size_t>(i)];
      kernels().float_product(product, panel, panel + 1, 0, x.m());
    });
  }

  void decode(const int64_t *wanted, int64_t count, float *out) const override {
    struct Decoded;
    const int64_t groups = source_.groups, group = source_.group, padded_group = source_.padded_group;
    parallel_for((count + lanes - 1) / lanes, [&](int64_t part) {
      float *values = scratch<float, Decoded>(weight_.columns * lanes);
      int64_t have = -1;
      for (int64_t i = part * lanes; i < std::min(count, (part + 1) * lanes); ++i) {
        if (const int64_t panel = wanted[i] / lanes; panel != have)
          kernels().decode_panel(weight_, have = panel, values);
        const float *lane = values + wanted[i] % lanes;
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t k = 0; k < group; ++k)
            out[i * columns + g * group + k] = lane[(g * padded_group + k) * lanes];
      }
    });
  }

  int64_t bytes() const override {
    return values_.bytes() + mask_.bytes() + begin_.bytes() + scale_.bytes() + scale16_.bytes() + zero_point_.bytes();
  }

  std::string layout() const override {
    constexpr const char *names[] = {"float32", "bfloat16", "float16", "int8", "int4", "int3", "int2"};
    return std::string(names[static_cast<int>(weight_.code)]) + (weight_.mask ? "-sparse" : "");
  }

protected:
  void prepare(const Rows &x) const override { x.padded(source_.group, source_.padded_group); }

  int64_t pieces(int64_t m) const override { return division(m).panel_pieces * division(m).row_pieces; }

  void piece(const Rows &x, const Product &p, int64_t index) const override {
    const Division d = division(x.m());
    const int64_t panel = index / d.row_pieces * d.panel_block, row = index % d.row_pieces * d.row_block;
    const FloatProduct product{&weight_, x.padded(source_.group, source_.padded_group), p.bias, p.y, p.y_stride};
    if (row < x.m())
      kernels().float_product(product, panel, std::min(panel + d.panel_block, panels()), row,
                              std::min(row + d.row_block, x.m()));
  }

private:
  int64_t panels() const { return (rows + lanes - 1) / lanes; }

  // Does each sparse panel end, by its masks, where the next begins?
  bool panels_follow() const {
    const int bits = bits_of(weight_.code);
    int64_t at = 0;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      if (begin_[panel] != at)
        return false;
      for (int64_t k = 0; k < weight_.columns; k += 4) { // nibbles of four columns begin at a whole byte
        int kept = 0;
        for (int64_t j = 0; j < 4; ++j)
          kept += std::popcount(mask_[panel * weight_.columns + k + j]);
        at += (kept * bits + 7) / 8;
      }
    }
    return at == values_.size();
  }

  // Few rows: long runs of panels, for the memory's sake. Many: pairs of panels, and blocks of rows too when
  // there are not enough pairs to share.
  struct Division {
    int64_t panel_block, panel_pieces, row_block, row_pieces;
  };
  Division division(int64_t m) const {
    const int64_t team = threads(), block = m <= 8 ? std::max<int64_t>(1, panels() / (4 * team)) : 2;
    const int64_t pieces = (panels() + block - 1) / block;
    const int64_t row_pieces = m <= 8 ? 1 : std::clamp<int64_t>(4 * team / pieces, 1, (m + 23) / 24);
    return {block, pieces, round_up((m + row_pieces - 1) / row_pieces, 12), row_pieces};
  }

  template <class Fill>
  void dense(int64_t panel_bytes, Fill &&fill) {
    values_ = Buffer<uint8_t>(panels() * panel_bytes);
    weight_.values = values_.data();
    weight_.panel_bytes = panel_bytes;
    parallel_for(panels(), [&](int64_t panel) { fill(panel, values_.data() + panel * panel_bytes); });
  }

  // keep(panel, mask, out) writes a panel's mask and kept values, and returns how many bytes these are.
  template <class Keep>
  void pack_sparse(Keep &&keep) {
    mask_ = Buffer<uint16_t>(panels() * weight_.columns);
    std::fill(mask_.begin(), mask_.end(), uint16_t{0});
    std::vector<std::vector<uint8_t>> kept(static_cast<size_t>(panels()));
    parallel_for(panels(), [&](int64_t panel) {
      std::vector<uint8_t> &bytes = kept[panel];
      bytes.resize(static_cast<size_t>(weight_.columns * lanes * bits_of(weight_.code) / 8 + 16));
      bytes.resize(static_cast<size_t>(keep(panel, mask_.data() + panel * weight_.columns, bytes.data())));
      bytes.shrink_to_fit();
    });
    begin_ = Buffer<int64_t>(panels());
    int64_t total = 0;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      begin_[panel] = total;
      total += static_cast<int64_t>(kept[panel].size());
    }
    values_ = Buffer<uint8_t>(total);
    for (int64_t panel = 0; panel < panels(); ++panel)
      std::copy(kept[panel].begin(), kept[panel].end(), values_.data() + begin_[panel]);
    weight_.values = values_.data();
    weight_.mask = mask_.data();
    weight_.begin = begin_.data();
  }

  static int64_t keep_bytes(const std::vector<int8_t> &all, const uint16_t *mask, uint8_t *out) {
    uint8_t *const begin = out;
    for (size_t i = 0; i < all.size(); ++i)
      if (mask[i / lanes] >> i % lanes & 1)
        *out++ = static_cast<uint8_t>(all[i]);
    return out - begin;
  }

  // Two a byte; each four columns begin at a whole byte.
  static int64_t keep_nibbles(const std::vector<int8_t> &all, const uint16_t *mask, uint8_t *out) {
    uint8_t *const begin = out;
    for (size_t four = 0; four < all.size(); four += 4 * lanes) {
      int count = 0;
      for (size_t i = four; i < four + 4 * lanes; ++i)
        if (mask[i / lanes] >> i % lanes & 1) {
          const auto nibble = static_cast<uint8_t>(all[i] & 15);
          out[count / 2] = count % 2 ? static_cast<uint8_t>(out[count / 2] | nibble << 4) : nibble;
          ++count;
        }
      out += (count + 1) / 2;
    }
    return out - begin;
  }

  // Steps in panels; as bfloat16 when all of them are.
  void pack_steps(const Codes &c) {
    const int64_t size = panels() * c.groups * lanes;
    const auto place = [&](auto *out, const auto *from) {
      for (int64_t row = 0; row < round_up(rows, lanes); ++row)
        for (int64_t g = 0; g < c.groups; ++g)
          out[(row / lanes * c.groups + g) * lanes + row % lanes] = row < rows ? from[row * c.groups + g] : 0;
    };
    Buffer<float> scale(size);
    place(scale.data(), c.scale);
    const auto bits = [](float s) { return __builtin_bit_cast(uint32_t, s); };
    if (std::all_of(scale.begin(), scale.end(), [&](float s) { return (bits(s) & 0xffff) == 0; })) {
      scale16_ = Buffer<uint16_t>(size);
      std::transform(scale.begin(), scale.end(), scale16_.begin(),
                     [&](float s) { return static_cast<uint16_t>(bits(s) >> 16); });
      weight_.scale16 = scale16_.data();
    } else {
      scale_ = std::move(scale);
      weight_.scale = scale_.data();
    }
    if (c.zero_point) {
      zero_point_ = Buffer<int8_t>(size);
      place(zero_point_.data(), c.zero_point);
      weight_.zero_point = zero_point_.data();
    }
  }

  PanelSource source_;
  FloatWeight weight_{};
  Buffer<uint8_t> values_;
  Buffer<uint16_t> mask_, scale16_;
  Buffer<int64_t> begin_;
  Buffer<float> scale_;
  Buffer<int8_t> zero_point_;
};

} // namespace

std::unique_ptr<Matrix> float_matrix(const void *values, Float type, int64_t rows, int64_t columns, bool sparse) {
  auto matrix = std::make_unique<FloatMatrix>(static_cast<Code>(type), rows, columns, 1);
  if (type == Float::f32)
    matrix->pack_floats(static_cast<const uint32_t *>(values), sparse);
  else
    matrix->pack_floats(static_cast<const uint16_t *>(values), sparse);
  return matrix;
}

std::unique_ptr<Matrix> coded_matrix(const Codes &codes, bool sparse) {
  auto matrix = std::make_unique<FloatMatrix>(code_of(codes.bits, sparse), codes.rows, codes.columns, codes.groups);
  matrix->pack_codes(codes, sparse);
  return matrix;
}

std::unique_ptr<Matrix> restored_floats(const StoredReader &reader) { return std::make_unique<FloatMatrix>(reader); }

} // namespace penjing
