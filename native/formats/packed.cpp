#include "formats/packed.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/kernels.h"
#include "runtime/pool.h"

namespace penjing {

static_assert(std::endian::native == std::endian::little, "packed words are little-endian");

namespace {

constexpr int64_t some_codes = 1 << 16; // a task's worth

void unpack_row(const int32_t *packed, int64_t columns, int bits, int8_t *codes) {
  const auto *stream = reinterpret_cast<const uint8_t *>(packed);
  const int64_t whole = columns / 8 * 8;
  kernels().unpack(stream, whole, bits, codes);
  if (whole == columns)
    return;
  uint8_t last[8] = {};
  int8_t eight[8];
  const int64_t used = whole / 8 * bits;
  std::memcpy(last, stream + used, static_cast<size_t>(((columns - whole) * bits + 7) / 8));
  kernels().unpack(last, 8, bits, eight);
  std::copy_n(eight, columns - whole, codes + whole);
}

template <class Row>
void each_row(int64_t rows, int64_t columns, Row &&row) {
  const int64_t block = std::max<int64_t>(1, some_codes / std::max<int64_t>(columns, 1));
  parallel_for((rows + block - 1) / block, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r)
      row(r);
  });
}

} // namespace

void pack_row(const int8_t *codes, int64_t columns, int bits, int32_t *packed) {
  auto *stream = reinterpret_cast<uint8_t *>(packed);
  const int64_t whole = columns / 8 * 8, used = whole / 8 * bits;
  kernels().pack(codes, whole, bits, stream);
  std::memset(stream + used, 0, static_cast<size_t>(packed_words(columns, bits) * 4 - used));
  if (whole == columns)
    return;
  int8_t eight[8];
  uint8_t last[8];
  std::fill_n(eight, 8, static_cast<int8_t>(-(1 << (bits - 1)))); // stored as 0
  std::copy(codes + whole, codes + columns, eight);
  kernels().pack(eight, 8, bits, last);
  std::memcpy(stream + used, last, static_cast<size_t>(((columns - whole) * bits + 7) / 8));
}

void pack(const int8_t *codes, int64_t rows, int64_t columns, int bits, int32_t *packed) {
  each_row(rows, columns, [&](int64_t row) {
    pack_row(codes + row * columns, columns, bits, packed + row * packed_words(columns, bits));
  });
}

void unpack(const int32_t *packed, int64_t rows, int64_t columns, int bits, int8_t *codes) {
  each_row(rows, columns, [&](int64_t row) {
    unpack_row(packed + row * packed_words(columns, bits), columns, bits, codes + row * columns);
  });
}

} // namespace penjing
