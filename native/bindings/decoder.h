// Descriptions (penjing.models.config) as the decoder takes them.
#pragma once

#include <string>

#include "bindings/arrays.h"
#include "decoder/decoder.h"

namespace penjing::bindings {

Activation activation(const std::string &name);

// Of a description `Experts`; the vectors are null. ValueError where the numbers contradict each other.
Router router(nb::handle experts);

// (matrix, bias or None) and (weight or None, bias or None), whose shapes are checked.
Linear linear_from(nb::handle given, const std::string &what, int64_t rows, int64_t columns);
Norm norm_from(nb::handle description, nb::handle given, const char *place, int64_t size);

// linears, norms: as above, by role and place.  vectors: arrays by name.  shared: the cache layer that a block reads
// which has none of its own.
void add_block(Decoder &decoder, int64_t hidden, int64_t per_layer_inner, nb::handle block, const nb::dict &linears,
               const nb::dict &norms, const nb::dict &vectors, int shared);

} // namespace penjing::bindings
