// Every key of a config, listed once: reading, help, configs/README.md and rows visit these lists. Parameters of
// policies are not here; each policy lists its own.
#pragma once
#include <string>
#include <vector>

#include "core/fields.hpp"
#include "core/spec.hpp"

namespace kv {

enum class AskedBackend { automatic, cpu, cuda };
enum class AskedCompress { automatic, prompt, always };
enum class AskedPositions { automatic, absolute, cache, span };
enum class OnInvalid { error, skip };
enum class AskedMetrics { standard, mass };

/// The keys of one point as asked for, before `auto` is resolved.
struct Keys {
  std::string trace, policy, budget;
  int seed = 0;
  AskedBackend backend = AskedBackend::automatic;
  std::string block = "auto";
  AskedCompress compress = AskedCompress::automatic;
  AskedPositions positions = AskedPositions::automatic;
  Precision precision = Precision::exact;
  std::string measure = "decode";
  Protect protect;
  Allocation allocation;
  AskedMetrics metrics = AskedMetrics::standard;
  bool series = false;
  int timing_repeats = 1;
  OnInvalid on_invalid = OnInvalid::error;

  void describe(auto& field) {
    constexpr Range counts{0, 1 << 30};
    field("trace", trace, "path of a trace file, relative to the working directory");
    field("policy", policy, "a policy's name, or a map of its name and parameters such as {name: h2o, recent: 0.5}");
    field("budget", budget,
          "what a cache holds after a compression: a share of the prompt (20%, 0.2), slots per KV head (512), or bytes "
          "of all recorded layers and heads together (64MiB); none for `full` and where a policy's own threshold "
          "decides");
    field("seed", seed, counts, "of policies that draw random numbers; equal seeds give equal bits");
    field("backend", backend, Choices{"auto", "cpu", "cuda"},
          "where the replay runs; auto: cuda when there is a GPU that works, else cpu");
    field("replay.block", block, "tokens of the prompt that are appended at once: a number, or all; auto: published");
    field("replay.compress", compress, Choices{"auto", "prompt", "always"},
          "stop compressing when decode begins, or go on; auto: published");
    field(
        "replay.positions", positions, Choices{"auto", "absolute", "cache", "span"},
        "kept keys stay rotated at their own position, or are rotated at read time by slot, or by the number of tokens "
        "that slots stand for; auto: published");
    field("replay.precision", precision, Choices{"exact", "fast"},
          "fast: on cuda, outputs of prompt blocks to bfloat16's precision (error 1e-3 instead of 1e-5, traces of "
          "16-bit numbers); what is kept stays the same");
    field("replay.measure", measure,
          "whose queries are compared with full attention: decode, prompt, all or last:N (the last N tokens)");
    field("protect.sinks", protect.sinks, counts, "first tokens that no policy may evict");
    field("protect.recent", protect.recent, counts, "newest slots that no policy may evict");
    field("allocation.kind", allocation.kind, Choices{"uniform", "pyramid", "adaptive"},
          "how the budget is spread: evenly, more to early layers, or by scores over the heads of a layer");
    field("allocation.beta", allocation.beta, Range{1, 1000}, "pyramid: the last layer gets 1/beta of an even share");
    field("allocation.floor", allocation.floor, Range{0, 1},
          "adaptive: the part of an even share that every head keeps");
    field("metrics", metrics, Choices{"standard", "mass"},
          "mass: also mass_tv, how far attention mass moved; as slow as full attention");
    field("series", series, "also write series/RUN.h5 with every query's errors, every step's slots and what was kept");
    field("timing.repeats", timing_repeats, Range{0, 1000},
          "timed passes after the checked one; 0 = none: the us.* of the row are null");
    field("on_invalid", on_invalid, Choices{"error", "skip"},
          "a point that its trace cannot serve: stop before the first run, or write a row with status skipped");
  }
};

/// Keys that shape a sweep instead of a point.
struct StructureKey {
  const char* name;
  const char* help;
};
inline constexpr StructureKey structure_keys[] = {
    {"zip", "a map of lists of one length that advance together instead of making a product"},
    {"sweep", "a list of blocks; each is a map of keys, and every list in it is an axis of a product"},
};

/// Names of all keys of a point, in order.
std::vector<std::string> key_names();

/// Throws ConfigError, with the nearest key, unless `key` is one of a point's keys or has the form policy.NAME.
void check_key(const std::string& key);

/// The same for a key that holds a map or a list: it may also be a group of keys, such as `replay`.
void check_group(const std::string& key);

}  // namespace kv
