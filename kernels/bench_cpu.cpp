// The CPU engine's rows of `kvreplay bench`.
#include <fmt/core.h>
#include <tbb/global_control.h>

#include <chrono>

#include "core/error.hpp"
#include "kernels/bench_work.hpp"

namespace kv {
namespace {

constexpr const char* work = "h2o 1024 slots on the CPU, a token and layer";
constexpr int slots = 1024, few = 64, many = 320, repeats = 5;  // slots, and decode tokens of two traces

/// One layer of a full cache and some decode tokens under H2O.
class Decode {
 public:
  explicit Decode(int tokens)
      : trace_(shape_of(tokens)), session_(trace_.file()), entry_(find_policy("h2o")), policy_(entry_.make()) {
    settings_.budget = slots;
    settings_.measured = parse_measure("decode", slots + tokens, slots);
    first_ = replay(session_, entry_, *policy_, settings_);
  }

  double microseconds() {
    const auto start = std::chrono::steady_clock::now();
    const ReplayResult again = replay(session_, entry_, *policy_, settings_);
    const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
    if (again.error2 != first_.error2) throw InternalError(fmt::format("bench: {}: does not repeat to the bit", work));
    return us.count();
  }

 private:
  static Synthetic shape_of(int tokens) {
    Synthetic shape;
    shape.layers = 1, shape.tokens = slots + tokens, shape.prompt_tokens = slots;
    return shape;
  }

  BenchTrace trace_;
  Session session_;
  const PolicyEntry& entry_;
  std::shared_ptr<BoundPolicy> policy_;
  ReplaySettings settings_;
  ReplayResult first_;
};

/// What the tokens take that one trace has beyond the other.
BenchRow time_h2o(const BenchPeers& peers) {
  const tbb::global_control two(tbb::global_control::max_allowed_parallelism, 2);
  Decode shorter(few), longer(many);
  std::vector<double> us;
  for (int repeat = 0; repeat < repeats; ++repeat)
    us.push_back((longer.microseconds() - shorter.microseconds()) / (many - few));
  return row_of(work, "eager PyTorch on the same two cores", us, peers.eager_cpu_h2o_us, 0.2, 0,
                "two threads, comparison with full attention included");
}

}  // namespace

void bench_cpu(BenchRun& run, const BenchPeers& peers) {
  run.add(work, [&] { return std::vector{time_h2o(peers)}; });
}

}  // namespace kv
