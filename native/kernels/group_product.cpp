// Integer weights times integer activations, a step for each segment of columns.
#include "kernels/bytes.h"
#include "kernels/kernels.h"

namespace penjing::PENJING_ISA {
namespace {

// few_rows: weights are unpacked once for so many, into registers.
#if defined(__AVX512VNNI__)
constexpr bool lookup_is_fast = true;         // sixteen bytes or more of a table in one instruction
constexpr int tile_rows = 6, tile_panels = 4; // 24 sums, in 32 registers
constexpr int few_rows = group_few / 2;
#elif defined(PENJING_NEON)
constexpr bool lookup_is_fast = true;
constexpr int tile_rows = 5, tile_panels = 1; // a sum takes four registers of 32
constexpr int few_rows = 4;
#elif defined(__AVXVNNI__)
constexpr bool lookup_is_fast = true;
constexpr int tile_rows = 2, tile_panels = 2;
constexpr int few_rows = 4; // a sum takes two registers of 16
#elif defined(__AVX2__)
constexpr bool lookup_is_fast = true;
constexpr int tile_rows = 2, tile_panels = 2;
constexpr int few_rows = 5; // eight are 1.15 times as fast at eight, in twice the code
#else
constexpr bool lookup_is_fast = false;
constexpr int tile_rows = 2, tile_panels = 1;
constexpr int few_rows = 2; // a sum takes four registers here; code for more rows is large, and no faster
#endif

// Independent sums a row, which hide the latency of a product.
constexpr int chains_of(int rows, [[maybe_unused]] bool sparse) {
#if defined(PENJING_NEON) // a sum is four already, and what expands codes wants the registers
  return sparse || rows > 2 ? 1 : rows == 1 ? 4 : 2;
#else
  return rows == 1 ? 4 : rows <= 5 ? 2 : 1;
#endif
}
constexpr int64_t chunk = group_columns; // quads unpacked at once: with four panels 32 KiB, in the first-level cache

// Bytes ahead that are asked for. The steps of a sparse stream vary, and the processor's own prefetch loses it: one
// thread read 8 GB/s of sparse int4 without this and 27 with it, of dense int4 26 and 32 (Zen 5). Into the second-level
// cache, which waits for more lines at once than the first: dense int4 0.97 of what reading alone gives, and 0.82 when
// asked into the first (Zen 4, 2 threads).
constexpr int64_t ahead = 8192;
PENJING_INLINE void ask(const uint8_t *p) { __builtin_prefetch(p + ahead, 0, 2); }

// A panel's segments, one after the other.
template <GroupCode code>
struct Panel {
  static constexpr bool sparse = false, wide = Packed<code>::wide;
  static constexpr int quads = Packed<code>::quads;
  const GroupWeight &w;
  const uint8_t *scales, *zeros, *codes;
  F16 scale = splat(0);
  I16 zero = izero();

  Panel(const GroupWeight &weight, int64_t panel) : Panel(weight, weight.panels + panel * weight.panel_bytes) {}
  Panel(const GroupWeight &weight, const uint8_t *begin)
      : w(weight), scales(begin), zeros(begin + w.scale_bytes), codes(zeros + w.zero_bytes) {}

  void start_group() {
    if (w.wide_scale) {
      scale = load(reinterpret_cast<const float *>(scales));
      scales += lanes * 4;
    } else {
      scale = from_bf16(reinterpret_cast<const uint16_t *>(scales));
      scales += lanes * 2;
    }
    zero = w.zero_bytes ? iload_bytes(zeros) : isplat(w.zero);
    zeros += lanes;
  }
  PENJING_INLINE void start_segment() {}

  template <class Use>
  PENJING_INLINE void block(Use &&use) {
    ask(codes);
    Packed<code>::block(codes, use);
    codes += Packed<code>::bytes;
  }
};

// The zero in the places that are not kept.
template <GroupCode code>
struct SparsePanel : Panel<GroupCode::int8> {
  static constexpr bool sparse = true, nibbles = code == GroupCode::sparse4, wide = !nibbles;
  const uint8_t *masks = nullptr;
  B64 rest = lane_bytes(izero());

  SparsePanel(const GroupWeight &weight, int64_t panel)
      : Panel<GroupCode::int8>(weight, weight.panels + weight.begin[panel]) {}

  void start_segment() {
    rest = lane_bytes(zero);
    masks = codes;
    for (int64_t i = 0; i < 8 * w.quads; i += 64)
      ask(codes + i);
    codes += 8 * w.quads;
  }

  template <class Use>
  PENJING_INLINE void block(Use &&use) {
    uint64_t mask;
    std::memcpy(&mask, masks, 8);
    masks += 8;
    ask(codes);
    const int kept = __builtin_popcountll(mask);
    if constexpr (nibbles) {
      use(Which<0>{}, expand_nibbles(codes, mask, rest));
      codes += (kept + 1) / 2;
    } else {
      use(Which<0>{}, expand(codes, mask, rest));
      codes += kept;
    }
  }
};

template <>
struct Panel<GroupCode::sparse8> : SparsePanel<GroupCode::sparse8> {
  using SparsePanel::SparsePanel;
};
template <>
struct Panel<GroupCode::sparse4> : SparsePanel<GroupCode::sparse4> {
  using SparsePanel::SparsePanel;
};

// Two of each four codes; 128 columns begin with the places of all.
template <>
struct Panel<GroupCode::pairs4> : Panel<GroupCode::int8> {
  static constexpr bool sparse = true, wide = false;
  static constexpr int quads = 2;
  const uint8_t *places = nullptr;
  int at = 0; // of the pairs of quads that the places are for

  Panel(const GroupWeight &weight, int64_t panel) : Panel<GroupCode::int8>(weight, panel) {}

  template <class Use>
  PENJING_INLINE void block(Use &&use) {
    if (at == 0) {
      places = codes;
      codes += pair_place_bytes;
    }
    expand_pairs(places, codes, at, use);
    codes += at % 2 * 64;
    at = (at + 1) % (pair_quads / 2);
  }
};

PENJING_INLINE void write(const GroupProduct &p, int64_t panel, int64_t row, F16 y) {
  const int64_t left = p.weight->rows - panel * lanes;
  const int n = static_cast<int>(left < lanes ? left : lanes);
  float *to = p.y + row * p.y_stride + panel * lanes;
  if (n == lanes)
    return store(to, p.bias ? add(y, load(p.bias + panel * lanes)) : y);
  store(to, p.bias ? add(y, load(p.bias + panel * lanes, n)) : y, n);
}

PENJING_INLINE F16 per_row_result(I16 sum, float step, F16 scale) {
  return mul(mul(to_float(sum), splat(step)), scale);
}

// y + the segment's sum · its steps.
PENJING_INLINE F16 add_segment(F16 y, I16 sum, float step, F16 scale) {
  return fma(to_float(sum), mul(splat(step), scale), y);
}

// −zero · Σ x, where a sum begins; the zero belongs to codes as dot counts them.
template <bool wide>
PENJING_INLINE I16 less_zeros(int32_t minus_sum, I16 zero) {
  return imul(isplat(minus_sum), code_less<wide> ? isub(zero, isplat(code_less<wide>)) : zero);
}

// Few rows: one pass over the panel, everything in registers.
template <GroupCode code, int rows>
void few(const GroupProduct &p, int64_t index, int64_t row) {
  using P = Panel<code>;
  constexpr int chains = chains_of(rows, P::sparse);
  constexpr int blocks = chains > P::quads ? chains / P::quads : 1;
  const GroupWeight &w = *p.weight;
  const int64_t segments = p.x.segments, stride = p.x.stride;
  const int8_t *x = p.x.codes + row * stride;
  const float *step = p.x.step + row * segments;
  const int32_t *minus_sum = p.x.minus_sum + row * segments;
  P panel(w, index);
  F16 y[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    y[r] = zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    panel.start_group();
    for (int64_t part = 0; part < w.parts; ++part, ++step, ++minus_sum) {
      panel.start_segment();
      I16 sum[rows][chains];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r][0] = less_zeros<P::wide>(minus_sum[r * segments], panel.zero);
#pragma GCC unroll 8
        for (int c = 1; c < chains; ++c)
          sum[r][c] = izero();
      }
      const auto block = [&](auto which) __attribute__((always_inline)) {
        panel.block([&](auto k, B64 v) __attribute__((always_inline)) {
          constexpr int at = decltype(which)::value * P::quads + decltype(k)::value;
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
            sum[r][at % chains] = dot_at<P::wide>(sum[r][at % chains], v, x + r * stride + 4 * at);
        });
      };
      int64_t q = 0;
      for (; q + blocks * P::quads <= w.quads; q += blocks * P::quads, x += 4 * blocks * P::quads) {
        block(Which<0>{});
        if constexpr (blocks > 1)
          block(Which<1>{});
        if constexpr (blocks > 2) {
          block(Which<2>{});
          block(Which<3>{});
        }
      }
      for (; q < w.quads; q += P::quads, x += 4 * P::quads)
        block(Which<0>{});
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 1; c < chains; ++c)
          sum[r][0] = iadd(sum[r][0], sum[r][c]);
        y[r] = w.per_row ? per_row_result(sum[r][0], step[r * segments], panel.scale)
                         : add_segment(y[r], sum[r][0], step[r * segments], panel.scale);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    write(p, index, row + r, y[r]);
}

#if defined(__AVX512VNNI__)

// Of two of each four codes x is chosen instead of the codes spread: one product for eight columns. What is not kept
// takes no part, so that zeros are taken off by what was chosen.
template <int rows>
void few_pairs(const GroupProduct &p, int64_t index, int64_t row) {
  constexpr int chains = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
  const GroupWeight &w = *p.weight;
  const int64_t segments = p.x.segments, stride = p.x.stride;
  const int8_t *x = p.x.codes + row * stride;
  const float *step = p.x.step + row * segments;
  Panel<GroupCode::pairs4> panel(w, index);
  F16 y[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    y[r] = zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    panel.start_group();
    for (int64_t part = 0; part < w.parts; ++part, ++step) {
      I16 sum[rows][chains], chosen[rows][chains];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c)
          sum[r][c] = chosen[r][c] = izero();
      const uint8_t *places = panel.codes, *codes = places + pair_place_bytes;
      panel.codes = codes + 512;
      for (int i = 0; i < pair_place_bytes; i += 64)
        ask(places + i);
#pragma GCC unroll 16
      for (int v = 0; v < pair_quads / 2; ++v, x += 8) {
        if (v % 2 == 0)
          ask(codes + v / 2 * 64);
        const B64 both = bload(codes + v / 2 * 64), nibbles = v % 2 ? field<4, 15>(both) : field<0, 15>(both);
        const B64 columns = pair_columns(pair_places(places, v));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          int64_t eight;
          std::memcpy(&eight, x + r * stride, 8);
          const B64 each = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), columns);
          sum[r][v % chains] = _mm512_dpbusd_epi32(sum[r][v % chains], nibbles, each);
          chosen[r][v % chains] = _mm512_dpbusd_epi32(chosen[r][v % chains], bsplat(pair_zero), each);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 1; c < chains; ++c) {
          sum[r][0] = iadd(sum[r][0], sum[r][c]);
          chosen[r][0] = iadd(chosen[r][0], chosen[r][c]);
        }
        y[r] = add_segment(y[r], isub(sum[r][0], chosen[r][0]), step[r * segments], panel.scale);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    write(p, index, row + r, y[r]);
}

#endif

template <GroupCode code, int rows>
void few_rows_of(const GroupProduct &p, int64_t panel, int64_t row) {
#if defined(__AVX512VNNI__)
  if constexpr (code == GroupCode::pairs4)
    few_pairs<rows>(p, panel, row);
  else
#endif
    few<code, rows>(p, panel, row);
}

template <GroupCode code, int rows = few_rows>
void few_of(const GroupProduct &p, int64_t panel, int64_t row, int64_t count) {
  if (count == rows)
    return few_rows_of<code, rows>(p, panel, row);
  if constexpr (rows > 1)
    few_of<code, rows - 1>(p, panel, row, count);
}

// Many rows: a chunk of some panels is unpacked once, [quad][panel][64], and multiplied by all rows. Between chunks
// results rest as they are, floats or (per row) integers, [row][panel][16].
struct Chunk {
  const GroupProduct &p;
  const uint8_t *unpacked;
  void *results;
  int64_t row_begin;
  int64_t segment, segments; // of x, that the chunk covers
  int64_t quad, quads;       // where its x begins, and how long a segment of it is
  bool first;
  F16 (*scale)[tile_panels]; // of each segment
  I16 (*zero)[tile_panels];
};

template <bool wide, int rows, int panels>
void tile(const Chunk &c, int64_t row) {
  const GroupWeight &w = *c.p.weight;
  const CodedRows &coded = c.p.x;
  const int8_t *x = coded.codes + row * coded.stride + 4 * c.quad;
  const uint8_t *unpacked = c.unpacked;
  auto *results = static_cast<uint8_t *>(c.results) + (row - c.row_begin) * panels * 64;
  const auto at = [&](int r, int i) __attribute__((always_inline)) { return results + (r * panels + i) * 64; };
  for (int64_t s = 0; s < c.segments; ++s) {
    const float *step = coded.step + row * coded.segments + c.segment + s;
    const int32_t *minus_sum = coded.minus_sum + row * coded.segments + c.segment + s;
    I16 sum[rows][panels]; // in registers only if every loop over it is unrolled: GCC stores all of it else, at 0.4 ×
                           // the speed
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < panels; ++i)
        sum[r][i] =
            w.per_row && !c.first ? iload(at(r, i)) : less_zeros<wide>(minus_sum[r * coded.segments], c.zero[s][i]);
    for (int64_t q = 0; q < c.quads; ++q, x += 4, unpacked += panels * 64) {
      B64 weight[panels];
#pragma GCC unroll 8
      for (int i = 0; i < panels; ++i)
        weight[i] = bload(unpacked + i * 64);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Quad<wide> each = quad<wide>(x + r * coded.stride);
#pragma GCC unroll 8
        for (int i = 0; i < panels; ++i)
          sum[r][i] = dot<wide>(sum[r][i], weight[i], each);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < panels; ++i)
        if (w.per_row) {
          istore(at(r, i), sum[r][i]);
        } else {
          const F16 before = c.first && s == 0 ? zero() : load(reinterpret_cast<const float *>(at(r, i)));
          store(reinterpret_cast<float *>(at(r, i)),
                add_segment(before, sum[r][i], step[r * coded.segments], c.scale[s][i]));
        }
  }
}

template <bool wide, int panels, int rows = tile_rows>
void tiles(const Chunk &c, int64_t row, int64_t row_end) {
  for (; row + rows <= row_end; row += rows)
    tile<wide, rows, panels>(c, row);
  if constexpr (rows > 1)
    tiles<wide, panels, rows - 1>(c, row, row_end);
}

template <GroupCode code, int panels>
void many(const GroupProduct &p, int64_t index, int64_t row_begin, int64_t row_end, uint8_t *scratch) {
  using P = Panel<code>;
  const GroupWeight &w = *p.weight;
  uint8_t *const unpacked = scratch, *const results = scratch + chunk * panels * 64;
  const auto panel_of = [&](int i) { return P(w, index + (i < panels ? i : 0)); };
  P panel[4] = {panel_of(0), panel_of(1), panel_of(2), panel_of(3)};
  constexpr int most = chunk; // segments in a chunk: of a quad each
  F16 scale[most][tile_panels];
  I16 zeros[most][tile_panels];
  const int64_t all = w.groups * w.parts, fit = chunk / w.quads > 1 ? chunk / w.quads : 1;
  for (int64_t segment = 0; segment < all; segment += fit) {
    const int64_t segments = all - segment < fit ? all - segment : fit;
    for (int64_t quad = 0; quad < w.quads; quad += chunk) { // more than one chunk only per row
      const int64_t quads = w.quads - quad < chunk ? w.quads - quad : chunk;
      for (int i = 0; i < panels; ++i) {
        uint8_t *out = unpacked + i * 64;
        for (int64_t s = 0; s < segments; ++s) {
          if (quad == 0 && (segment + s) % w.parts == 0)
            panel[i].start_group();
          if (quad == 0)
            panel[i].start_segment();
          scale[s][i] = panel[i].scale;
          zeros[s][i] = panel[i].zero;
          for (int64_t q = 0; q < quads; q += P::quads, out += P::quads * panels * 64)
            panel[i].block([&](auto k, B64 v)
                               __attribute__((always_inline)) { bstore(out + k.value * panels * 64, v); });
        }
      }
      const Chunk c{
          p,     unpacked, results, row_begin, segment, segments, segment * w.quads + quad, quads, segment + quad == 0,
          scale, zeros};
      tiles<P::wide, panels>(c, row_begin, row_end);
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int i = 0; i < panels; ++i) {
      const uint8_t *result = results + ((row - row_begin) * panels + i) * 64;
      write(p, index + i, row,
            w.per_row ? per_row_result(iload(result), p.x.step[row * p.x.segments], panel[i].scale)
                      : load(reinterpret_cast<const float *>(result)));
    }
}

template <GroupCode code>
void product(const GroupProduct &p, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end, uint8_t *scratch) {
  constexpr bool unpack_once = Panel<code>::sparse || (code == GroupCode::mxfp4 && !lookup_is_fast);
  if (const int64_t rows = row_end - row; rows <= (unpack_once ? few_rows : group_few)) {
    // Equal parts: all but the first find the panel in the cache. To expand a sparse one twice, or to look up every
    // byte twice where there are no shuffles, costs more than a tile.
    const int64_t parts = (rows + few_rows - 1) / few_rows, most = (rows + parts - 1) / parts;
    for (; panel < panel_end; ++panel)
      for (int64_t at = row; at < row_end; at += most)
        few_of<code>(p, panel, at, row_end - at < most ? row_end - at : most);
    return;
  }
  for (; panel + tile_panels <= panel_end; panel += tile_panels)
    many<code, tile_panels>(p, panel, row, row_end, scratch);
  for (; panel < panel_end; ++panel)
    many<code, 1>(p, panel, row, row_end, scratch);
}

template <GroupCode code>
void unpack(const GroupWeight &w, int64_t index, uint8_t *codes) {
  Panel<code> panel(w, index);
  for (int64_t g = 0; g < w.groups; ++g) {
    panel.start_group();
    for (int64_t part = 0; part < w.parts; ++part) {
      panel.start_segment();
      for (int64_t q = 0; q < w.quads; q += Panel<code>::quads, codes += Panel<code>::quads * 64)
        panel.block([&](auto k, B64 v) __attribute__((always_inline)) { bstore(codes + k.value * 64, v); });
    }
  }
}

template <GroupCode code>
struct Kind {
  static constexpr GroupCode value = code;
};

template <class Use>
PENJING_INLINE void with_code(GroupCode code, Use &&use) {
  switch (code) {
  case GroupCode::int8: return use(Kind<GroupCode::int8>{});
  case GroupCode::int4: return use(Kind<GroupCode::int4>{});
  case GroupCode::int3: return use(Kind<GroupCode::int3>{});
  case GroupCode::int2: return use(Kind<GroupCode::int2>{});
  case GroupCode::mxfp4: return use(Kind<GroupCode::mxfp4>{});
  case GroupCode::sparse8: return use(Kind<GroupCode::sparse8>{});
  case GroupCode::sparse4: return use(Kind<GroupCode::sparse4>{});
  case GroupCode::pairs4: return use(Kind<GroupCode::pairs4>{});
  }
}

} // namespace

void group_product(const GroupProduct &p, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
                   uint8_t *scratch) {
  with_code(p.weight->code,
            [&](auto kind) { product<decltype(kind)::value>(p, panel_begin, panel_end, row_begin, row_end, scratch); });
}

void group_panel(const GroupWeight &w, int64_t panel, uint8_t *codes) {
  with_code(w.code, [&](auto kind) { unpack<decltype(kind)::value>(w, panel, codes); });
}

} // namespace penjing::PENJING_ISA
