// Arrays as Python passes them (numpy, or anything with DLPack), checked before any kernel sees them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstring>
#include <initializer_list>
#include <string>

#include "runtime/buffer.h"

namespace penjing::bindings {

namespace nb = nanobind;
using In = nb::ndarray<nb::ro>;
using Out = nb::ndarray<>;
using MaybeIn = std::optional<In>;

constexpr int64_t any = -1; // a dimension of any size

inline std::string shape_text(const int64_t *shape, size_t dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims; ++i)
    text += (i ? ", " : "") + (shape[i] == any ? std::string("any") : std::to_string(shape[i]));
  return text + ")";
}

template <class T>
const char *type_name() {
  const nb::dlpack::dtype type = nb::dtype<T>();
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float))
    return "float32";
  const bool sign = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int);
  switch (type.bits) {
  case 8: return sign ? "int8" : "uint8";
  case 16: return sign ? "int16" : "uint16";
  case 32: return sign ? "int32" : "uint32";
  default: return sign ? "int64" : "uint64";
  }
}

template <class Array>
bool contiguous(const Array &array) {
  int64_t expected = 1;
  if (array.size() == 0)
    return true;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected)
      return false;
    expected *= static_cast<int64_t>(array.shape(i));
  }
  return true;
}

// The array's memory; throws ValueError unless it is a contiguous array of T, on the CPU, of that shape.
template <class T, class Array>
auto checked(const Array &array, const char *what, const int64_t *shape, size_t dims) {
  bool fits = array.dtype() == nb::dtype<T>() && array.ndim() == dims &&
              array.device_type() == nb::device::cpu::value && contiguous(array);
  for (size_t i = 0; fits && i < dims; ++i)
    fits = shape[i] == any || static_cast<int64_t>(array.shape(i)) == shape[i];
  if (!fits) {
    const auto *given = reinterpret_cast<const int64_t *>(array.shape_ptr());
    const std::string text = std::string(what) + ": give a contiguous " + type_name<T>() + " array " +
                             shape_text(shape, dims) + " on the CPU; this one is " + shape_text(given, array.ndim());
    throw nb::value_error(text.c_str());
  }
  if constexpr (Array::ReadOnly)
    return static_cast<const T *>(array.data());
  else
    return static_cast<T *>(array.data());
}

template <class T, class Array>
auto checked(const Array &array, const char *what, std::initializer_list<int64_t> shape) {
  return checked<T>(array, what, shape.begin(), shape.size());
}

template <class T>
const T *checked(const MaybeIn &array, const char *what, std::initializer_list<int64_t> shape) {
  return array ? checked<T>(*array, what, shape) : nullptr;
}

// A new numpy array, uninitialised, and its memory.
template <class T>
nb::object numpy_array(const size_t *shape, size_t dims, T **data) {
  int64_t size = 1;
  for (size_t i = 0; i < dims; ++i)
    size *= static_cast<int64_t>(shape[i]);
  auto *kept = new Buffer<T>(size);
  nb::capsule owner(kept, [](void *p) noexcept { delete static_cast<Buffer<T> *>(p); });
  *data = kept->data();
  return nb::cast(nb::ndarray<nb::numpy, T>(kept->data(), dims, shape, owner));
}

// Where results go: `out`, checked, or a new array when that is None.
inline nb::object output(nb::handle out, const size_t *shape, size_t dims, float **data) {
  if (out.is_none())
    return numpy_array(shape, dims, data);
  Out array;
  if (!nb::try_cast(out, array))
    throw nb::value_error("out: give a writable array");
  *data = checked<float>(array, "out", reinterpret_cast<const int64_t *>(shape), dims);
  return nb::borrow(out);
}

inline void require(bool holds, const std::string &message) {
  if (!holds)
    throw nb::value_error(message.c_str());
}

} // namespace penjing::bindings
