#include "kernels/group_pack.h"

#include <cstring>

namespace penjing {
namespace {

constexpr int vector = 64;

// `count` quads in the fields of one vector, the first in the lowest bits.
template <int bits>
void pack_fields(const uint8_t *quads, uint8_t *out) {
  for (int i = 0; i < vector; ++i) {
    unsigned byte = 0;
    for (int q = 0; q < 8 / bits; ++q)
      byte |= static_cast<unsigned>(quads[q * vector + i] & ((1 << bits) - 1)) << (bits * q);
    out[i] = static_cast<uint8_t>(byte);
  }
}

void pack_threes(const uint8_t *quads, uint8_t *out) {
  pack_fields<2>(quads, out);
  pack_fields<2>(quads + 4 * vector, out + vector);
  for (int i = 0; i < vector; ++i) {
    unsigned byte = 0;
    for (int q = 0; q < 8; ++q)
      byte |= static_cast<unsigned>(quads[q * vector + i] >> 2 & 1) << q;
    out[2 * vector + i] = static_cast<uint8_t>(byte);
  }
}

// Which two of a quad's codes are kept, by a mask of at most two that differ from the zero (see pair_quads).
constexpr uint8_t pair_of[16] = {0, 0, 0, 0, 1, 4, 1, 0, 2, 3, 5, 0, 2, 0, 0, 0};

void pack_pairs(const uint8_t *quads, uint8_t *out) {
  uint16_t places[3][vector / 2] = {};
  uint8_t *codes = out + pair_place_bytes;
  for (int v = 0; v < pair_quads / 2; ++v)
    for (int i = 0; i < vector / 2; ++i) { // [lane][quad]
      const uint8_t *four = quads + (2 * v + i % 2) * vector + i / 2 * 4;
      unsigned mask = 0;
      for (int k = 0; k < 4; ++k)
        mask |= static_cast<unsigned>(four[k] != pair_zero) << k;
      const unsigned place = pair_of[mask], first = place & 3;
      const uint8_t kept[2] = {four[first], four[(first + 1 + (place >> 2)) & 3]};
      if (v < 15)
        places[v / 5][i] |= static_cast<uint16_t>(place << 3 * (v % 5));
      else
        for (int bit = 0; bit < 3; ++bit)
          places[bit][i] |= static_cast<uint16_t>((place >> bit & 1) << 15);
      for (int k = 0; k < 2; ++k) {
        uint8_t &byte = codes[v / 2 * vector + 2 * i + k];
        byte = static_cast<uint8_t>(v % 2 ? byte | kept[k] << 4 : kept[k]);
      }
    }
  std::memcpy(out, places, sizeof places);
}

} // namespace

int64_t packed_quads(GroupCode code) {
  switch (code) {
  case GroupCode::int4:
  case GroupCode::mxfp4: return 2;
  case GroupCode::int3: return 8;
  case GroupCode::int2: return 4;
  case GroupCode::pairs4: return pair_quads;
  default: return 1;
  }
}

int64_t packed_bytes(GroupCode code, int64_t quads) {
  const int together = code == GroupCode::pairs4 ? pair_place_bytes / vector + pair_quads / 4
                       : code == GroupCode::int3 ? 3
                                                 : 1;
  return quads / packed_quads(code) * together * vector;
}

void pack_dense(GroupCode code, const uint8_t *quads, int64_t count, uint8_t *out) {
  const int64_t together = packed_quads(code);
  for (int64_t q = 0; q < count; q += together) {
    switch (together) {
    case 1: std::memcpy(out, quads, vector); break;
    case 2: pack_fields<4>(quads, out); break;
    case 4: pack_fields<2>(quads, out); break;
    case pair_quads: pack_pairs(quads, out); break;
    default: pack_threes(quads, out);
    }
    quads += together * vector;
    out += packed_bytes(code, together);
  }
}

int64_t pack_sparse(GroupCode code, const uint8_t *quads, int64_t count, const uint8_t (&zero)[16], uint8_t *out) {
  uint8_t *kept = out + 8 * count;
  for (int64_t q = 0; q < count; ++q, quads += vector) {
    uint8_t codes[vector + 1];
    uint64_t mask = 0;
    int n = 0;
    for (int lane = 0; lane < 16; ++lane) {
      unsigned bits = 0;
      for (int column = 0; column < 4; ++column) { // without a branch: half of them would be mispredicted
        const uint8_t code = quads[4 * lane + column];
        const unsigned keep = code != zero[lane];
        codes[n] = code;
        n += static_cast<int>(keep);
        bits |= keep << column;
      }
      mask |= static_cast<uint64_t>(bits) << 4 * lane;
    }
    std::memcpy(out + 8 * q, &mask, sizeof mask);
    if (code == GroupCode::sparse4) { // two a byte; each quad begins at a whole one
      codes[n] = 0;
      for (int i = 0; i < n; i += 2)
        *kept++ = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
    } else {
      std::memcpy(kept, codes, static_cast<size_t>(n));
      kept += n;
    }
  }
  return kept - out;
}

} // namespace penjing
