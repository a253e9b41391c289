// Convolution as a product of gathered rows: an output pixel's row of x is where its taps are in the padded image.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernels/fit.h"
#include "kernels/integer.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

// Products of fewer multiplications than this are done before another thread would have woken.
constexpr int64_t worth_sharing = 1 << 21;

int64_t product(const Size &size) { return size[0] * size[1] * size[2]; }

// Groups that fill a panel together: a depthwise convolution has one output a group, a panel sixteen rows.
int64_t groups_in_part(const ConvShape &shape) {
  const int64_t outputs = shape.outputs / shape.groups;
  int64_t merged = 1;
  for (int64_t n = 2; n * outputs <= lanes && n <= shape.groups; ++n)
    if (shape.groups % n == 0)
      merged = n;
  return merged;
}

} // namespace

Size ConvShape::output(const Size &input) const {
  Size size;
  for (int i = 0; i < 3; ++i) {
    const int64_t room = input[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    if (room < 0)
      throw std::invalid_argument("the kernel does not fit into an input of " + std::to_string(input[i]) + " with " +
                                  std::to_string(padding[i]) + " of padding");
    size[i] = room / stride[i] + 1;
  }
  return size;
}

// Where things are for one size of input. A part's image is [block of 4 channels][depth][height][width][4].
struct IntegerConv::Plan {
  Size input, padded, output;
  int64_t block_bytes; // of one block of four channels
  std::vector<int32_t> quad_offset, row_offset;

  Plan(const ConvShape &shape, const Size &in, int64_t blocks) : input(in), output(shape.output(in)) {
    for (int i = 0; i < 3; ++i)
      padded[i] = in[i] + 2 * shape.padding[i];
    block_bytes = 4 * product(padded);
    if (block_bytes * blocks > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("an image of more than 2 GiB a group of channels");
    const auto at = [&](int64_t d, int64_t h, int64_t w) {
      return static_cast<int32_t>(4 * ((d * padded[1] + h) * padded[2] + w));
    };
    const Size &dilation = shape.dilation, &stride = shape.stride, &kernel = shape.kernel;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t d = 0; d < kernel[0]; ++d)
        for (int64_t h = 0; h < kernel[1]; ++h)
          for (int64_t w = 0; w < kernel[2]; ++w)
            quad_offset.push_back(static_cast<int32_t>(block * block_bytes) +
                                  at(d * dilation[0], h * dilation[1], w * dilation[2]));
    for (int64_t d = 0; d < output[0]; ++d)
      for (int64_t h = 0; h < output[1]; ++h)
        for (int64_t w = 0; w < output[2]; ++w)
          row_offset.push_back(at(d * stride[0], h * stride[1], w * stride[2]));
  }
};

IntegerConv::IntegerConv(const ConvShape &s, const int8_t *codes, const float *scale, const int8_t *zero_point,
                         const float *bias, bool relu)
    : shape(s), merged_(groups_in_part(s)), blocks_((s.inputs / s.groups * merged_ + 3) / 4), relu_(relu) {
  const int64_t outputs = s.outputs / s.groups * merged_, inputs = s.inputs / s.groups, taps = product(s.kernel);
  // Each part's weight is block-diagonal over its groups; off the diagonal stands what counts as zero.
  std::vector<int64_t> columns;
  for (int64_t block = 0; block < blocks_; ++block)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t channel = 4 * block; channel < 4 * block + 4; ++channel)
        columns.push_back(channel < inputs * merged_ ? channel * taps + tap : -1);
  const int64_t width = inputs * merged_ * taps;
  std::vector<int8_t> wide(static_cast<size_t>(outputs * width));
  for (int64_t first = 0; first < s.outputs; first += outputs) {
    for (int64_t row = 0; row < outputs; ++row) {
      const int64_t group = row / (s.outputs / s.groups);
      int8_t *out = wide.data() + row * width;
      std::fill(out, out + width, zero_point ? zero_point[first + row] : int8_t{0});
      std::copy_n(codes + (first + row) * inputs * taps, inputs * taps, out + group * inputs * taps);
    }
    parts_.emplace_back(wide.data(), outputs, width, columns, scale + first, zero_point ? zero_point + first : nullptr,
                        bias ? bias + first : nullptr);
  }
}

int64_t IntegerConv::bytes() const {
  int64_t total = 0;
  for (const Int8Panels &part : parts_)
    total += part.bytes();
  return total;
}

std::shared_ptr<const IntegerConv::Plan> IntegerConv::plan(const Size &input) const {
  std::lock_guard lock(mutex_);
  if (!plan_ || plan_->input != input)
    plan_ = std::make_shared<const Plan>(shape, input, blocks_);
  return plan_;
}

// Codes of a part's channels, with a border that stands for 0.
void IntegerConv::encode(const Plan &plan, const float *x, float inverse, float zero, uint8_t *bytes,
                         uint8_t border) const {
  const int64_t channels = shape.inputs / shape.groups * merged_, pixels = product(plan.input);
  const Size &in = plan.input, &out = plan.padded, &pad = shape.padding;
  const bool bordered = plan.block_bytes != 4 * pixels;
  for (int64_t block = 0; block < blocks_; ++block, bytes += plan.block_bytes) {
    const float *planes[4];
    uint32_t empty = 0;
    for (int64_t c = 0; c < 4; ++c) {
      const bool real = 4 * block + c < channels;
      planes[c] = real ? x + (4 * block + c) * pixels : nullptr;
      empty |= real ? uint32_t{border} << 8 * c : 0;
    }
    if (!bordered) {
      kernels().encode_quads(planes, pixels, inverse, zero, bytes);
      continue;
    }
    std::fill_n(reinterpret_cast<uint32_t *>(bytes), plan.block_bytes / 4, empty);
    for (int64_t d = 0; d < in[0]; ++d)
      for (int64_t h = 0; h < in[1]; ++h) {
        uint8_t *row = bytes + 4 * (((d + pad[0]) * out[1] + h + pad[1]) * out[2] + pad[2]);
        kernels().encode_quads(planes, in[2], inverse, zero, row);
        for (const float *&plane : planes)
          plane = plane ? plane + in[2] : nullptr;
      }
  }
}

void IntegerConv::run_sample(const Plan &plan, const float *x, const Activation &activation, Result result) const {
  struct Bytes;
  const int64_t pixels = product(plan.output), image = product(plan.input);
  const int64_t part_inputs = shape.inputs / shape.groups * merged_, part_bytes = blocks_ * plan.block_bytes;
  const auto parts = static_cast<int64_t>(parts_.size());
  auto *bytes = scratch<uint8_t, Bytes>(parts * part_bytes);
  const Step step = fit(x, shape.inputs * image, activation);
  const auto encode_part = [&](int64_t part) {
    encode(plan, x + part * part_inputs * image, step.inverse, step.bias, bytes + part * part_bytes,
           static_cast<uint8_t>(step.zero));
  };
  const auto run = [&](int64_t part, int64_t begin, int64_t end) {
    const Int8Panels &panels = parts_[static_cast<size_t>(part)];
    const int64_t at = part * panels.weight().rows * pixels;
    const Int8Product product{&panels.weight(),
                              bytes + part * part_bytes,
                              plan.row_offset.data(),
                              plan.quad_offset.data(),
                              &step.zero,
                              &step.step,
                              0,
                              panels.scale(),
                              panels.bias(),
                              relu_,
                              result.y ? result.y + at : nullptr,
                              result.sums ? result.sums + at : nullptr,
                              1,
                              pixels};
    kernels().int8_product(product, 0, panels.panels(), begin, end);
  };
  const int64_t work = pixels * parts * parts_[0].panels() * lanes * 4 * parts_[0].weight().quads;
  if (work < worth_sharing) {
    for (int64_t part = 0; part < parts; ++part) {
      encode_part(part);
      run(part, 0, pixels);
    }
    return;
  }
  parallel_for(parts, encode_part);
  const int64_t pieces = std::clamp<int64_t>(4 * threads() / parts, 1, (pixels + 47) / 48);
  const int64_t block = ((pixels + pieces - 1) / pieces + 47) / 48 * 48;
  parallel_for(parts * pieces, [&](int64_t i) {
    const int64_t begin = i % pieces * block;
    if (begin < pixels)
      run(i / pieces, begin, std::min(begin + block, pixels));
  });
}

void IntegerConv::run(const float *x, int64_t n, const Size &input, const Activation &activation, Result result) const {
  const std::shared_ptr<const Plan> plan = this->plan(input);
  const int64_t x_size = shape.inputs * product(input), y_size = shape.outputs * product(plan->output);
  const auto sample = [&](int64_t i) {
    run_sample(*plan, x + i * x_size, activation,
               {result.y ? result.y + i * y_size : nullptr, result.sums ? result.sums + i * y_size : nullptr});
  };
  if (n * y_size * blocks_ * 4 * product(shape.kernel) < worth_sharing || n < threads())
    for (int64_t i = 0; i < n; ++i)
      sample(i);
  else
    parallel_for(n, sample);
}

} // namespace penjing
