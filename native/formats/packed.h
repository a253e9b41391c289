// Codes of 2 to 8 bits as rows of int32 words, the layout of src/penjing/formats/packed.py.
#pragma once

#include <cstdint>

namespace penjing {

constexpr int64_t packed_words(int64_t columns, int bits) { return (columns * bits + 31) / 32; }

void pack(const int8_t *codes, int64_t rows, int64_t columns, int bits, int32_t *packed);
void unpack(const int32_t *packed, int64_t rows, int64_t columns, int bits, int8_t *codes);

// One row.
void pack_row(const int8_t *codes, int64_t columns, int bits, int32_t *packed);

} // namespace penjing
