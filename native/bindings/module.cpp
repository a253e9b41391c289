// penjing._native: checks what Python passes and forwards it; one file a theme.
#include <nanobind/nanobind.h>

#include "runtime/bandwidth.h"
#include "runtime/cpu.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace penjing::bindings {
void matrix(nb::module_ &m);
void integer(nb::module_ &m);
void pairs(nb::module_ &m);
void formats(nb::module_ &m);
void decoder(nb::module_ &m);
void elements(nb::module_ &m);
void kv(nb::module_ &m);
void sample(nb::module_ &m);
void stored(nb::module_ &m);
} // namespace penjing::bindings

NB_MODULE(_native, m) {
  m.def(
      "isa", [] { return penjing::name(penjing::active_isa()); },
      "The instruction set that the kernels use on this machine.");
  m.def("threads", &penjing::threads, "Threads that a large product is spread over.");
  m.def("set_threads", &penjing::set_threads, nb::arg("count"), nb::call_guard<nb::gil_scoped_release>());
  m.def("read_bandwidth", &penjing::read_bandwidth, nb::arg("bytes"), nb::arg("rounds"),
        nb::call_guard<nb::gil_scoped_release>(), "Bytes a second that the threads read: the best of some rounds.");
  penjing::bindings::matrix(m);
  penjing::bindings::integer(m);
  penjing::bindings::formats(m);
  penjing::bindings::pairs(m);
  penjing::bindings::decoder(m);
  penjing::bindings::elements(m);
  penjing::bindings::kv(m);
  penjing::bindings::sample(m);
  penjing::bindings::stored(m);
}
