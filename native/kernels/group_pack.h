// Codes of a panel into the bytes that group_product reads.
#pragma once

#include <cstdint>

#include "kernels/group.h"

namespace penjing {

// Quads that are packed together, so that a segment is a multiple of them.
int64_t packed_quads(GroupCode code);

// Dense: bytes of so many quads.
int64_t packed_bytes(GroupCode code, int64_t quads);

// quads: [quad][16 rows][4 columns], a code a byte.
void pack_dense(GroupCode code, const uint8_t *quads, int64_t count, uint8_t *out);

// One segment: its masks, then what differs from the zero of its row. Returns how many bytes; there must be room for 72
// a quad.
int64_t pack_sparse(GroupCode code, const uint8_t *quads, int64_t count, const uint8_t (&zero)[16], uint8_t *out);

} // namespace penjing
