// One allocation, many arrays: laid out first, allocated once, handed out in the same order.
#pragma once
#include <cstddef>

namespace kv {

/// Hands out arrays one behind the other; without a base it only counts.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  /// `count` values, aligned to what memory moves at once (128 bytes); null while counting.
  template <class T>
  T* take(std::size_t count) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T)));
  }
  char* take_bytes(std::size_t bytes) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + 127) / 128 * 128;
    return at;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace kv
