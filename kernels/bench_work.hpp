// What the rows of `kvreplay bench` have in common: made-up traces, policies, the check against the CPU engine.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/replay.hpp"
#include "core/synthetic.hpp"
#include "kernels/bench.hpp"

namespace kv {

/// A made-up trace in a temporary file, for as long as it is needed.
class BenchTrace {
 public:
  /// settings.layers layers, of which the first `distinct` are made and written again and again.
  explicit BenchTrace(const Synthetic& settings, int distinct = 1);
  ~BenchTrace();
  BenchTrace(const BenchTrace&) = delete;
  BenchTrace& operator=(const BenchTrace&) = delete;
  const std::filesystem::path& file() const { return file_; }

 private:
  std::filesystem::path file_;
};

/// A policy with its parameters set.
std::shared_ptr<BoundPolicy> make_policy(const PolicyEntry& entry,
                                         const std::vector<std::pair<std::string, std::string>>& parameters);

/// What the CPU engine keeps of its one layer must be what every layer of `device` kept but for 1 % of slots, and the
/// errors of the first must agree to 0.5 %. Throws InternalError.
void check_against(const ReplayResult& cpu, const ReplayResult& device, const std::string& work);

double median(std::vector<double> values);

/// The row of a work that took `us` in several passes; `floor_us` is 0 where it is not known.
BenchRow row_of(const std::string& work, const std::string& floor, const std::vector<double>& us, double floor_us,
                double must, double goal, const std::string& note);

}  // namespace kv
