// Deterministic chance: a counter-based generator, so that a draw depends on what it is for and on nothing else (not on
// schedule, threads, block size or backend).
#pragma once
#include <cstdint>

namespace kv {

/// Mixes one more word into a hash (the finaliser of splitmix64).
constexpr std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  std::uint64_t z = hash + 0x9e3779b97f4a7c15ull + word * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/// Uniform in [0, 1) with 24 bits, keyed by seed, layer, KV head and token.
constexpr float uniform(std::uint64_t seed, int layer, int kv_head, int token) {
  const std::uint64_t hash =
      mix(mix(mix(mix(0, seed), static_cast<std::uint64_t>(layer)), static_cast<std::uint64_t>(kv_head)),
          static_cast<std::uint64_t>(token));
  return static_cast<float>(hash >> 40) * 0x1p-24f;
}

}  // namespace kv
