#include "runtime/cpu.h"

namespace penjing {

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2"))
      return Isa::avx512_vnni;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Isa::avx2;
    return Isa::scalar;
  }();
  return isa;
#else
  return Isa::scalar;
#endif
}

const char *name(Isa isa) {
  switch (isa) {
  case Isa::avx512_vnni:
    return "avx512-vnni";
  case Isa::avx2:
    return "avx2";
  default:
    return "scalar";
  }
}

} // namespace penjing
