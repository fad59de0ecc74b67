// What the CUDA engine costs against what it cannot go below: `kvreplay bench` prints it. Every row is checked against the
// CPU engine before it is timed, and is a ratio to a rate of the same run.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace kv {

/// One line of the table.
struct BenchRow {
  std::string work, floor;       // what was done, and what it is divided by
  double us = 0, floor_us = 0;   // measured, and the floor; microseconds
  double must = 0, goal = 0;     // ratios to reach; 0 = none was set
  double noise = 0;              // (max - min) / median over repeats
  std::string note;              // "" or what is to be known
  double ratio() const { return us / floor_us; }
};

struct BenchRates {
  std::string device;
  double copy = 0, read = 0;  // bytes per second of a large copy (read and written), and of reading only
};

struct BenchResult {
  BenchRates rates;
  std::vector<BenchRow> rows;
};

/// Runs the rows whose work contains `only` ("" = all), telling `finished` of each. Throws CudaError without a device,
/// InternalError when a result is not what the CPU engine gives.
BenchResult bench_device(const std::string& only, const std::function<void(const BenchRow&)>& finished);

}  // namespace kv
