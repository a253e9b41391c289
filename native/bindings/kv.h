#pragma once

#include <string>

#include "decoder/kv.h"

namespace penjing::bindings {

// float32, float16, bfloat16, int8 or int4; ValueError for another name.
KvType kv_type(const std::string &name);

} // namespace penjing::bindings
