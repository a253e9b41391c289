// What this processor can do, asked once.
#pragma once

namespace penjing {

enum class Isa { scalar, avx2, avx512_vnni };

// The best instruction set that both this build and this processor have.
Isa best_isa();
const char *name(Isa isa);

} // namespace penjing
