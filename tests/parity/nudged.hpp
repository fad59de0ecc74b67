// One trace several times, its logits off by about what the other engine's arithmetic makes of them: how far a point's
// results move between the copies is how far rounding alone can move them.
#pragma once
#include <fmt/core.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/hdf5.hpp"
#include "core/policy.hpp"
#include "core/replay.hpp"
#include "core/session.hpp"

namespace kv::test {

class NudgedTraces {
 public:
  /// Relative to every logit; a float32 sum of 64 products is off by some 2^-22, at worst 2^-18.
  static constexpr double nudges[] = {0x1p-20, -0x1p-20, 0x1p-21, -0x1p-21, 0x1p-22, -0x1p-22};
  /// For policies whose merges follow key gradients of bfloat16 elements: CUDA's tensor cores take the probabilities
  /// behind the outputs, the output gradients and the slopes by the logits as two 16-bit words (tensor_words.cuh), off
  /// by 2^-18 on average, at worst 2^-16. That turns last bits of joined keys, then which links join next.
  static constexpr double word_nudges[] = {0x1p-17, -0x1p-17, 0x1p-18, -0x1p-18, 0x1p-19, -0x1p-19};

  explicit NudgedTraces(const TraceHeader& trace) : trace_(trace) {}
  ~NudgedTraces() {
    std::error_code ignored;
    for (const Copies* copies : {&sums_, &words_})
      for (const auto& session : *copies) std::filesystem::remove(session->header().file, ignored);
  }
  NudgedTraces(const NudgedTraces&) = delete;
  NudgedTraces& operator=(const NudgedTraces&) = delete;

  /// What replay(session) makes of each copy; they are written when first asked for.
  std::vector<ReplayResult> each(const Traits& traits, const std::function<ReplayResult(Session&)>& replay) {
    std::vector<ReplayResult> results;
    const auto add = [&](Copies& copies, std::span<const double> sizes) {
      if (copies.empty())
        for (const double nudge : sizes) copies.push_back(std::make_unique<Session>(copy(nudge)));
      for (const auto& session : copies) results.push_back(replay(*session));
    };
    add(sums_, nudges);
    if (traits.key_gradient != KeyGradient::none && trace_.dtype == Dtype::bfloat16) add(words_, word_nudges);
    return results;
  }

 private:
  using Copies = std::vector<std::unique_ptr<Session>>;

  std::filesystem::path copy(double nudge) const {
    const auto path = std::filesystem::temp_directory_path() / fmt::format("kvreplay-nudged-{}-{}.h5", nudge, getpid());
    std::filesystem::copy_file(trace_.file, path, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::permissions(path, std::filesystem::perms::owner_write, std::filesystem::perm_options::add);
    h5::File::modify(path).group("model").set_number("scale", trace_.model.scale * (1 + nudge));
    return path;
  }

  const TraceHeader& trace_;
  Copies sums_, words_;
};

}  // namespace kv::test
