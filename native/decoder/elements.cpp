#include "decoder/elements.h"

#include <type_traits>

#include "runtime/cpu.h"

namespace penjing {

template <class Pointer>
using Member = std::remove_pointer_t<Pointer>;

// The functions of one instruction set, compiled with it (see CMakeLists.txt).
#define PENJING_ELEMENTS(isa)                                                                                          \
  namespace isa {                                                                                                      \
  Member<decltype(Elements::rms_norm)> rms_norm;                                                                       \
  Member<decltype(Elements::layer_norm)> layer_norm;                                                                   \
  Member<decltype(Elements::rotate)> rotate;                                                                           \
  Member<decltype(Elements::activate)> activate;                                                                       \
  Member<decltype(Elements::gate)> gate;                                                                               \
  Member<decltype(Elements::add)> add_scaled;                                                                          \
  Member<decltype(Elements::multiply)> multiply;                                                                       \
  Member<decltype(Elements::softcap)> softcap;                                                                         \
  Member<decltype(Elements::finite)> finite;                                                                           \
  Member<decltype(Elements::convolve)> convolve;                                                                       \
  Member<decltype(Elements::delta)> delta;                                                                             \
  constexpr Elements element_table = {rms_norm, layer_norm, rotate, activate, gate, add_scaled,                        \
                                      multiply, softcap,    finite, convolve, delta};                                  \
  }

PENJING_ELEMENTS(scalar)
#if defined(__x86_64__)
PENJING_ELEMENTS(avx2)
PENJING_ELEMENTS(avx512_vnni)
#elif defined(__aarch64__)
PENJING_ELEMENTS(neon)
#endif

const Elements &elements() {
  static const Elements &chosen = []() -> const Elements & {
#if defined(__x86_64__)
    switch (active_isa()) {
    case Isa::avx512_vnni: return avx512_vnni::element_table;
    case Isa::avx_vnni:
    case Isa::avx2: return avx2::element_table;
    default: break;
    }
#elif defined(__aarch64__)
    if (active_isa() == Isa::neon)
      return neon::element_table;
#endif
    return scalar::element_table;
  }();
  return chosen;
}

} // namespace penjing
