// The three storage types of a trace. Everything is computed in float32.
#pragma once
#include <cstddef>

namespace kv {

enum class Dtype { float16, bfloat16, float32 };

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::float16 ? "float16" : dtype == Dtype::bfloat16 ? "bfloat16" : "float32";
}

inline std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace kv
