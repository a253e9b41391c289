// The only nanobind code: checks what Python passes and forwards it.
#include <nanobind/nanobind.h>

#include "runtime/cpu.h"

NB_MODULE(_native, m) {
  m.def("isa", [] { return penjing::name(penjing::best_isa()); },
        "The instruction set that the kernels use on this machine.");
}
