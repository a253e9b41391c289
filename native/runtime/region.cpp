#include "runtime/region.h"

#include <algorithm>
#include <cerrno>
#include <unistd.h>

#include "runtime/buffer.h"
#include "runtime/checksum.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

bool read_all(int file, uint8_t *to, int64_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t got = pread(file, to, static_cast<size_t>(size), offset);
    if (got < 0 && errno == EINTR)
      continue;
    if (got <= 0)
      return false;
    to += got, size -= got, offset += got;
  }
  return true;
}

} // namespace

Region read_region(int file, int64_t size, const std::vector<Section> &sections) {
  Region region;
  const auto memory = std::make_shared<Buffer<uint8_t>>(size);
  region.bytes = std::shared_ptr<uint8_t>(memory, memory->data());
  struct Block {
    size_t section;
    int64_t at, size;
  };
  std::vector<Block> blocks;
  std::vector<size_t> first;
  for (size_t i = 0; i < sections.size(); ++i) {
    first.push_back(blocks.size());
    for (int64_t at = 0; at < sections[i].size; at += checksum_block)
      blocks.push_back({i, sections[i].offset + at, std::min(checksum_block, sections[i].size - at)});
  }
  first.push_back(blocks.size());
  std::vector<uint64_t> sums(blocks.size());
  std::vector<uint8_t> read(blocks.size());
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    const Block &block = blocks[static_cast<size_t>(i)];
    uint8_t *to = region.bytes.get() + block.at;
    read[static_cast<size_t>(i)] = read_all(file, to, block.size, block.at);
    if (read[static_cast<size_t>(i)])
      sums[static_cast<size_t>(i)] = checksum(to, block.size);
  });
  for (size_t i = 0; i < sections.size(); ++i) {
    const auto all = std::all_of(read.begin() + static_cast<std::ptrdiff_t>(first[i]),
                                 read.begin() + static_cast<std::ptrdiff_t>(first[i + 1]), [](uint8_t r) { return r; });
    const auto count = static_cast<int64_t>(first[i + 1] - first[i]);
    region.whole.push_back(all && checksum_of(sums.data() + first[i], count, sections[i].size) == sections[i].checksum);
  }
  return region;
}

} // namespace penjing
