// How a trace is replayed: the words of design section 4 as types.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kv {

enum class Phase { prompt, decode };
enum class Compress { prompt, always };  // stop compressing when decode begins, or go on
/// Where kept keys are rotated to: their own position, their place in the cache, or (span) the number of tokens that
/// the slots up to them stand for. The last two rotate unrotated keys at read time.
enum class Positions { absolute, cache, span };
/// On CUDA: how probabilities enter the value products of prompt blocks. exact: as two 16-bit words, error 1e-5; fast:
/// as one, error 1e-3. What a policy sees, and so what it keeps, is the same.
enum class Precision { exact, fast };
enum class Scope { head, layer };  // a selection per KV head, or one for all heads of a layer

inline const char* name_of(Compress c) { return c == Compress::prompt ? "prompt" : "always"; }
inline const char* name_of(Positions p) {
  return p == Positions::absolute ? "absolute" : p == Positions::cache ? "cache" : "span";
}
inline const char* name_of(Precision p) { return p == Precision::exact ? "exact" : "fast"; }

/// Tokens of the prompt that are appended at once; 0 = the whole prompt in one block. A decode token is its own block.
struct Block {
  int tokens = 0;
  bool operator==(const Block&) const = default;
};

/// Slots that no policy may evict: tokens before `sinks` and the newest `recent`.
struct Protect {
  int sinks = 0, recent = 0;
};

/// How a budget is spread: the same everywhere, more to early layers, or more to the heads of a layer whose scores ask
/// for it.
struct Allocation {
  enum class Kind { uniform, pyramid, adaptive } kind = Kind::uniform;
  double beta = 20;    // pyramid: the last layer gets 1/beta of the mean
  double floor = 0.2;  // adaptive: the share of an even split that every head keeps
};

inline const char* name_of(Allocation::Kind k) {
  return k == Allocation::Kind::uniform ? "uniform" : k == Allocation::Kind::pyramid ? "pyramid" : "adaptive";
}

/// What `replay.*: auto` resolves to: the settings of the policy's paper (policies.md, "published").
struct Published {
  Block block{};
  Compress compress = Compress::always;
  Positions positions = Positions::absolute;
};

/// "all" or a positive number of tokens. Throws ConfigError.
Block parse_block(const std::string& text);
std::string name_of(Block block);

/// Which tokens' queries are measured: "decode", "prompt", "all" or "last:N", of a trace with `tokens` tokens of which
/// `prompt_tokens` are the prompt; ascending. Throws ConfigError on another word or when nothing would be measured.
std::vector<int> parse_measure(const std::string& text, int tokens, int prompt_tokens);

/// floor(share * whole) as decimals mean it: 0.7 of 10 is 7. The rule for a policy's shares of its budget.
constexpr int share_of(double share, int whole) { return static_cast<int>(share * whole + 1e-9); }

}  // namespace kv
