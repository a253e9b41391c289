#include "runtime/cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace penjing {

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"))
      return Isa::avx512_vnni;
    return avx2 ? Isa::avx2 : Isa::scalar;
  }();
  return isa;
#else
  return Isa::scalar;
#endif
}

static Isa chosen_isa() {
  const char *wanted = std::getenv("PENJING_ISA");
  if (!wanted || !*wanted)
    return best_isa();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512_vnni})
    if (std::string(wanted) == name(isa)) {
      if (isa > best_isa())
        throw std::invalid_argument(std::string("PENJING_ISA=") + wanted + ": this processor goes up to " +
                                    name(best_isa()));
      return isa;
    }
  throw std::invalid_argument(std::string("PENJING_ISA=") + wanted + ": known are scalar, avx2, avx512-vnni");
}

Isa active_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

const char *name(Isa isa) {
  switch (isa) {
  case Isa::avx512_vnni: return "avx512-vnni";
  case Isa::avx2: return "avx2";
  default: return "scalar";
  }
}

} // namespace penjing
