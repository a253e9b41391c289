// What this processor can do, asked once.
#pragma once

namespace penjing {

enum class Isa {
  scalar,
  avx2,
  avx_vnni, // its integer products, else avx2
  avx512_vnni,
  neon, // with dot products
};

// The best instruction set that both this build and this processor have.
Isa best_isa();

// The one in use: the best, or a lower one named by the environment variable PENJING_ISA when first asked.
// Throws std::invalid_argument when that name is unknown or beyond this processor.
Isa active_isa();

const char *name(Isa isa);

} // namespace penjing
