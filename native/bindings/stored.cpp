#include "kernels/stored.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "runtime/checksum.h"
#include "runtime/region.h"

namespace penjing::bindings {
namespace {

// Bytes that come in pieces, written and summed a block at a time.
class Sink {
public:
  explicit Sink(int file) : file_(file), block_(checksum_block) {}

  void add(const void *from, int64_t size) {
    for (const auto *at = static_cast<const uint8_t *>(from); size > 0;) {
      const int64_t part = std::min(size, checksum_block - filled_);
      std::memcpy(block_.data() + filled_, at, static_cast<size_t>(part));
      at += part, size -= part, filled_ += part;
      if (filled_ == checksum_block)
        flush();
    }
  }
  void flush() {
    if (filled_ == 0)
      return;
    sums_.push_back(checksum(block_.data(), filled_));
    for (int64_t done = 0; done < filled_;) {
      const ssize_t count = ::write(file_, block_.data() + done, static_cast<size_t>(filled_ - done));
      if (count < 0 && errno != EINTR)
        throw std::system_error(errno, std::generic_category());
      done += std::max<ssize_t>(count, 0);
    }
    total_ += std::exchange(filled_, 0);
  }
  int64_t total() const { return total_; }
  uint64_t sum() const { return checksum_of(sums_.data(), static_cast<int64_t>(sums_.size()), total_); }

private:
  int file_;
  int64_t filled_ = 0, total_ = 0;
  Buffer<uint8_t> block_;
  std::vector<uint64_t> sums_;
};

// Writes what a matrix is stored as to where the file is → how many bytes, and their checksum.
std::pair<int64_t, uint64_t> store(const Matrix &matrix, int file) {
  constexpr uint8_t zeros[64] = {};
  const Stored stored = matrix.stored();
  Sink sink(file);
  try {
    nb::gil_scoped_release release;
    sink.add(&stored.header, sizeof stored.header);
    for (int i = 0; i < stored_arrays; ++i) {
      const int64_t size = stored.header.bytes[i];
      sink.add(stored.arrays[i], size);
      sink.add(zeros, padded_to_line(size) - size);
    }
    sink.flush();
  } catch (const std::system_error &error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  return {sink.total(), sink.sum()};
}

// The matrices in a file's sections (offset, size, checksum); None in place of what is damaged.
nb::list load(int file, const std::vector<std::tuple<int64_t, int64_t, uint64_t>> &wanted) {
  std::vector<Section> sections;
  int64_t end = 0;
  for (const auto &[offset, size, sum] : wanted) {
    require(offset >= end && offset % 64 == 0 && size >= 0 && size <= (int64_t{1} << 46) - offset,
            "sections: give them in order, without overlap, aligned to 64 bytes");
    sections.push_back({offset, size, sum});
    end = offset + size;
  }
  Region region;
  {
    nb::gil_scoped_release release;
    region = read_region(file, end, sections);
  }
  nb::list found;
  for (size_t i = 0; i < sections.size(); ++i) {
    std::unique_ptr<Matrix> matrix;
    if (region.whole[i]) {
      try {
        matrix = restored(region.bytes.get() + sections[i].offset, sections[i].size, region.bytes);
      } catch (const Damaged &) {
      }
    }
    found.append(matrix ? nb::cast(std::move(matrix)) : nb::none());
  }
  return found;
}

uint64_t sum_of(const nb::bytes &bytes) {
  return checksum_all(reinterpret_cast<const uint8_t *>(bytes.c_str()), static_cast<int64_t>(bytes.size()));
}

} // namespace

void stored(nb::module_ &m) {
  m.attr("STORED_LAYOUT") = stored_layout;
  m.def("store_matrix", &store, nb::arg("matrix"), nb::arg("file"));
  m.def("load_matrices", &load, nb::arg("file"), nb::arg("sections"));
  m.def("checksum", &sum_of, nb::arg("bytes"));
}

} // namespace penjing::bindings
