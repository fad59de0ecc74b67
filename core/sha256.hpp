// SHA-256 (FIPS 180-4) of a stream of bytes: the identity of a trace's content.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace kv {

class Sha256 {
 public:
  void update(std::span<const std::byte> bytes);
  /// Digest of all bytes so far as 64 lower-case hex digits. Nothing may be added afterwards.
  std::string hex();

 private:
  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> block_{};  // bytes that do not fill a block yet
  std::uint64_t bytes_ = 0;
};

namespace sha256_detail {
/// Both fold `blocks` 64-byte blocks into `state`; the second uses the CPU's own instructions (eight times as fast).
void compress_portable(std::uint32_t* state, const std::byte* data, std::size_t blocks);
void compress_native(std::uint32_t* state, const std::byte* data, std::size_t blocks);
bool has_native();
}  // namespace sha256_detail

}  // namespace kv
