#include "kernels/bench_work.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "core/error.hpp"
#include "core/trace_writer.hpp"

namespace kv {

void BenchRun::add(const std::string& name, const std::function<std::vector<BenchRow>()>& make) {
  if (name.find(only_) == std::string::npos) return;
  try {
    for (const BenchRow& row : make()) {
      rows_.push_back(row);
      finished_(row);
    }
  } catch (const std::exception& error) {
    if (failure_.empty()) failure_ = error.what();
  }
}

BenchTrace::BenchTrace(const Synthetic& settings, int distinct) {
  static int count = 0;
  file_ = std::filesystem::temp_directory_path() / fmt::format("kvreplay-bench-{}-{}.h5", getpid(), ++count);
  const TraceHeader header = synthetic_header(settings);
  TraceWriter writer(file_, header);
  std::vector<LayerTensors> made;
  for (int l = 0; l < std::min(distinct, settings.layers); ++l) made.push_back(synthetic_layer(settings, l));
  for (std::size_t l = 0; l < header.layers.size(); ++l) writer.write_layer(header.layers[l], made[l % made.size()]);
  writer.close();
}

BenchTrace::~BenchTrace() {
  std::error_code ignored;
  std::filesystem::remove(file_, ignored);
}

std::shared_ptr<BoundPolicy> make_policy(const PolicyEntry& entry,
                                         const std::vector<std::pair<std::string, std::string>>& parameters) {
  const std::shared_ptr<BoundPolicy> policy = entry.make();
  for (const Field& field : policy->fields())
    for (const auto& [name, value] : parameters)
      if (field.name == name) field.set(parse_value(field, value));
  return policy;
}

void check_against(const ReplayResult& cpu, const ReplayResult& device, const std::string& work) {
  std::size_t kept = 0, differing = 0;
  for (std::size_t i = 0; i < device.final_position.size(); ++i) {
    const std::vector<std::int64_t>&mine = device.final_position[i],
          &theirs = cpu.final_position[i % static_cast<std::size_t>(cpu.kv_heads)];
    std::vector<std::int64_t> others;
    std::ranges::set_symmetric_difference(mine, theirs, std::back_inserter(others));
    kept += mine.size() + theirs.size(), differing += others.size();
  }
  double got = 0, expected = 0;
  for (std::size_t i = 0; i < cpu.error2.size(); ++i) got += device.error2[i], expected += cpu.error2[i];
  // A tie that rounding decides may change a slot; more than that is wrong.
  if (!(100 * differing <= kept) || !(std::abs(got - expected) <= 5e-3 * expected))
    throw InternalError(fmt::format("bench: {}: {} of {} slots are others than on the CPU, squared error {} against {}",
                                    work, differing / 2, kept / 2, got, expected));
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

BenchRow row_of(const std::string& work, const std::string& floor, const std::vector<double>& us, double floor_us,
                double must, double goal, const std::string& note) {
  const auto [low, high] = std::minmax_element(us.begin(), us.end());
  const double middle = median(us), noise = (*high - *low) / middle;
  return {.work = work,
          .floor = floor,
          .us = middle,
          .floor_us = floor_us > 0 ? floor_us : std::numeric_limits<double>::quiet_NaN(),
          .must = must,
          .goal = goal,
          .noise = noise,
          .note = note};
}

}  // namespace kv
