// One trace several times, its logits off by about what another order of summation makes of them: how far a point's
// results move between the copies is how far rounding alone can move them.
#pragma once
#include <fmt/core.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "core/hdf5.hpp"
#include "core/session.hpp"

namespace kv::test {

class NudgedTraces {
 public:
  /// Relative to every logit; a float32 sum of 64 products is off by some 2^-22, at worst 2^-18.
  static constexpr double nudges[] = {0x1p-20, -0x1p-20, 0x1p-21, -0x1p-21, 0x1p-22, -0x1p-22};

  explicit NudgedTraces(const TraceHeader& trace) : trace_(trace) {}
  ~NudgedTraces() {
    std::error_code ignored;
    for (const auto& session : sessions_) std::filesystem::remove(session->header().file, ignored);
  }
  NudgedTraces(const NudgedTraces&) = delete;
  NudgedTraces& operator=(const NudgedTraces&) = delete;

  /// What replay(session) makes of each copy; they are written at the first call.
  std::vector<ReplayResult> each(const std::function<ReplayResult(Session&)>& replay) {
    if (sessions_.empty())
      for (const double nudge : nudges) sessions_.push_back(std::make_unique<Session>(copy(1 + nudge)));
    std::vector<ReplayResult> results;
    for (const auto& session : sessions_) results.push_back(replay(*session));
    return results;
  }

 private:
  std::filesystem::path copy(double factor) const {
    const auto path =
        std::filesystem::temp_directory_path() / fmt::format("kvreplay-nudged-{}-{}.h5", sessions_.size(), getpid());
    std::filesystem::copy_file(trace_.file, path, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::permissions(path, std::filesystem::perms::owner_write, std::filesystem::perm_options::add);
    h5::File::modify(path).group("model").set_number("scale", trace_.model.scale * factor);
    return path;
  }

  const TraceHeader& trace_;
  std::vector<std::unique_ptr<Session>> sessions_;
};

}  // namespace kv::test
