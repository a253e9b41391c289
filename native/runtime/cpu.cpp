#include "runtime/cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace penjing {

#if defined(__x86_64__)
static constexpr Isa known[] = {Isa::scalar, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni};

static bool has_avx_vnni() {
  unsigned a = 0, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#elif defined(__aarch64__)
static constexpr Isa known[] = {Isa::scalar, Isa::neon};

static bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long asimddp = 1ul << 20; // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & asimddp;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#else
static constexpr Isa known[] = {Isa::scalar};
#endif

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
    return !avx2 ? Isa::scalar : has_avx_vnni() ? Isa::avx_vnni : Isa::avx2;
  }();
  return isa;
#elif defined(__aarch64__)
  static const Isa isa = has_dot_products() ? Isa::neon : Isa::scalar;
  return isa;
#else
  return Isa::scalar;
#endif
}

static Isa chosen_isa() {
  const char *wanted = std::getenv("PENJING_ISA");
  if (!wanted || !*wanted)
    return best_isa();
  std::string names;
  for (Isa isa : known) {
    if (std::string(wanted) == name(isa)) {
      if (isa > best_isa())
        throw std::invalid_argument(std::string("PENJING_ISA=") + wanted + ": this processor goes up to " +
                                    name(best_isa()));
#if defined(__x86_64__)
      if (isa == Isa::avx_vnni && !has_avx_vnni()) // which many with AVX-512 do not have
        throw std::invalid_argument("PENJING_ISA=avx-vnni: this processor does not have it");
#endif
      return isa;
    }
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument(std::string("PENJING_ISA=") + wanted + ": known are " + names);
}

Isa active_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

const char *name(Isa isa) {
  switch (isa) {
  case Isa::avx512_vnni: return "avx512-vnni";
  case Isa::avx_vnni: return "avx-vnni";
  case Isa::avx2: return "avx2";
  case Isa::neon: return "neon";
  default: return "scalar";
  }
}

} // namespace penjing
