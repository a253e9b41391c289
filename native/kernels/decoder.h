// The parts of a decoder that have no weights, spread over the threads.
#pragma once

#include "kernels/kernels.h"

namespace penjing {

// All heads and queries; see Attention in kernels.h.
void attention(const Attention &a);

// out = gate · sigmoid(gate) · up, n floats each.
void gated_product(const float *gate, const float *up, int64_t n, float *out);

} // namespace penjing
