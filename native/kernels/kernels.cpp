#include "kernels/kernels.h"

#include <type_traits>

#include "runtime/cpu.h"

namespace penjing {

template <class Pointer>
using Function = std::remove_pointer_t<Pointer>;

// The functions of one instruction set, compiled with it (see CMakeLists.txt).
#define PENJING_TABLE(isa)                                                                                             \
  namespace isa {                                                                                                      \
  Function<decltype(Kernels::float_product)> float_product;                                                            \
  Function<decltype(Kernels::decode_panel)> decode_panel;                                                              \
  Function<decltype(Kernels::int8_product)> int8_product;                                                              \
  Function<decltype(Kernels::group_product)> group_product;                                                            \
  Function<decltype(Kernels::group_panel)> group_panel;                                                                \
  Function<decltype(Kernels::encode_segments)> encode_segments;                                                        \
  Function<decltype(Kernels::attend_cached)> attend_cached;                                                            \
  Function<decltype(Kernels::write_cached)> write_cached;                                                              \
  Function<decltype(Kernels::block_maxima)> block_maxima;                                                              \
  Function<decltype(Kernels::softmax_weights)> softmax_weights;                                                        \
  Function<decltype(Kernels::softmax_sums)> softmax_sums;                                                              \
  Function<decltype(Kernels::range)> range;                                                                            \
  Function<decltype(Kernels::encode_bytes)> encode_bytes;                                                              \
  Function<decltype(Kernels::encode_quads)> encode_quads;                                                              \
  Function<decltype(Kernels::to_float)> to_float;                                                                      \
  Function<decltype(Kernels::group_ranges)> group_ranges;                                                              \
  Function<decltype(Kernels::encode_groups)> encode_groups;                                                            \
  Function<decltype(Kernels::pack)> pack;                                                                              \
  Function<decltype(Kernels::unpack)> unpack;                                                                          \
  Function<decltype(Kernels::has_nonfinite)> has_nonfinite;                                                            \
  Function<decltype(Kernels::compress)> compress;                                                                      \
  Function<decltype(Kernels::expand)> expand;                                                                          \
  Function<decltype(Kernels::settle_outputs)> settle_outputs;                                                          \
  Function<decltype(Kernels::search_outputs)> search_outputs;                                                          \
  constexpr Kernels table = {float_product,   decode_panel,  int8_product,   group_product, group_panel,               \
                             encode_segments, attend_cached, write_cached,   block_maxima,  softmax_weights,           \
                             softmax_sums,    range,         encode_bytes,   encode_quads,  to_float,                  \
                             group_ranges,    encode_groups, pack,           unpack,        has_nonfinite,             \
                             compress,        expand,        settle_outputs, search_outputs};                          \
  }

PENJING_TABLE(scalar)
#if defined(__x86_64__)
PENJING_TABLE(avx2)
namespace avx_vnni { // integer products of its own, and all else of AVX2
Function<decltype(Kernels::int8_product)> int8_product;
Function<decltype(Kernels::group_product)> group_product;
Function<decltype(Kernels::group_panel)> group_panel;
constexpr Kernels table = [] {
  Kernels all = avx2::table;
  all.int8_product = int8_product;
  all.group_product = group_product;
  all.group_panel = group_panel;
  return all;
}();
} // namespace avx_vnni
PENJING_TABLE(avx512_vnni)
#elif defined(__aarch64__)
PENJING_TABLE(neon)
#endif

const Kernels &kernels() {
  static const Kernels &chosen = [&]() -> const Kernels & {
#if defined(__x86_64__)
    switch (active_isa()) {
    case Isa::avx512_vnni: return avx512_vnni::table;
    case Isa::avx_vnni: return avx_vnni::table;
    case Isa::avx2: return avx2::table;
    default: break;
    }
#elif defined(__aarch64__)
    if (active_isa() == Isa::neon)
      return neon::table;
#endif
    return scalar::table;
  }();
  return chosen;
}

} // namespace penjing
