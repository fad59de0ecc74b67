#include "core/trace_words.hpp"

#include <Eigen/Core>
#include <bit>
#include <cstring>

namespace kv {
namespace {

// bfloat16 is the upper half of a float32.
float from_bfloat16(std::uint16_t word) { return std::bit_cast<float>(static_cast<std::uint32_t>(word) << 16); }

// Exponent and mantissa shifted into place, times 2^(127 - 15): right for subnormal words too, without a branch.
float from_float16(std::uint16_t word) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(word & 0x7fff) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(word & 0x8000) << 16;
  const std::uint32_t special = (word & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity and NaN keep their kind
  const auto scaled = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(scaled | special | sign);
}

/// Whether any word has all bits of `exponent` set; without an early exit, so that it vectorises.
template <class Word>
bool any_not_finite(const Word* words, std::size_t count, Word exponent) {
  unsigned found = 0;
  for (std::size_t i = 0; i < count; ++i) found |= (words[i] & exponent) == exponent;
  return found != 0;
}

template <class Word>
std::optional<std::uint64_t> search(std::span<const std::byte> bytes, Word exponent) {
  const Word* const words = reinterpret_cast<const Word*>(bytes.data());
  const std::size_t count = bytes.size() / sizeof(Word);
  if (!any_not_finite(words, count, exponent)) return std::nullopt;
  for (std::size_t i = 0; i < count; ++i)
    if ((words[i] & exponent) == exponent) return i;
  return std::nullopt;
}

template <class Narrow>
void narrow_all(std::span<const float> values, std::byte* words) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Narrow rounded(values[i]);
    std::memcpy(words + 2 * i, &rounded, 2);
  }
}

}  // namespace

void widen(Dtype dtype, std::span<const std::byte> words, float* values) {
  const std::size_t count = words.size() / size_of(dtype);
  const auto* const narrow = reinterpret_cast<const std::uint16_t*>(words.data());
  switch (dtype) {
    case Dtype::float16:
      for (std::size_t i = 0; i < count; ++i) values[i] = from_float16(narrow[i]);
      return;
    case Dtype::bfloat16:
      for (std::size_t i = 0; i < count; ++i) values[i] = from_bfloat16(narrow[i]);
      return;
    case Dtype::float32:
      if (count > 0) std::memcpy(values, words.data(), count * sizeof(float));
  }
}

std::vector<std::byte> narrow(Dtype dtype, std::span<const float> values) {
  std::vector<std::byte> words(values.size() * size_of(dtype));
  switch (dtype) {
    case Dtype::float16:
      narrow_all<Eigen::half>(values, words.data());
      break;
    case Dtype::bfloat16:
      narrow_all<Eigen::bfloat16>(values, words.data());
      break;
    case Dtype::float32:
      if (!values.empty()) std::memcpy(words.data(), values.data(), words.size());
  }
  return words;
}

std::optional<std::uint64_t> first_not_finite(Dtype dtype, std::span<const std::byte> words) {
  switch (dtype) {
    case Dtype::float16:
      return search<std::uint16_t>(words, 0x7c00);
    case Dtype::bfloat16:
      return search<std::uint16_t>(words, 0x7f80);
    case Dtype::float32:
      break;
  }
  return search<std::uint32_t>(words, 0x7f800000);
}

}  // namespace kv
