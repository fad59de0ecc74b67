// What the engines cost against what they cannot go below: `kvreplay bench` prints it. Every row is checked before it is
// timed, and is a ratio to a rate of the same machine.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace kv {

/// One line of the table.
struct BenchRow {
  std::string work, floor;      // what was done, and what it is divided by
  double us = 0, floor_us = 0;  // measured, and the floor (NaN where a peer's rate is not known)
  double must = 0, goal = 0;    // ratios to reach; 0 = none was set
  double noise = 0;             // (max - min) / median over repeats
  std::string note;             // "" or what is to be known
  double cold_us = 0;           // the same after the L2 cache was swept; 0 = not measured
  double ratio() const { return us / floor_us; }
};

/// What other programs do on the same machine in the same run (tests/bench/peers.py); 0 = not known.
struct BenchPeers {
  double gemm_flops = 0;        // per second of a large bfloat16 matrix product
  double attention_16k_us = 0;  // cuDNN's full causal attention, 16384 tokens, 32 query and 8 KV heads of 128
  double eager_h2o_us = 0;      // a token of H2O at 1024 slots in eager PyTorch, one layer
  double eager_cpu_h2o_us = 0;  // the same on two cores
};

/// The rows so far of those whose work contains `only` ("" = all); `finished` is told of each.
class BenchRun {
 public:
  BenchRun(std::string only, std::function<void(const BenchRow&)> finished)
      : only_(std::move(only)), finished_(std::move(finished)) {}

  /// Runs the rows of a work that is asked for. One that throws does not take the others with it.
  void add(const std::string& work, const std::function<std::vector<BenchRow>()>& make);

  const std::vector<BenchRow>& rows() const { return rows_; }
  const std::string& failure() const { return failure_; }  // of the first work that threw; "" when none did

 private:
  std::string only_;
  std::function<void(const BenchRow&)> finished_;
  std::vector<BenchRow> rows_;
  std::string failure_;
};

/// A GPU while it is timed.
struct DeviceClocks {
  int sm_mhz = 0;         // of the multiprocessors; 0 = unknown
  std::string throttled;  // what keeps the clocks down, "" = nothing
};

struct BenchDevice {
  std::string name;
  double copy = 0, read = 0;   // bytes per second of a large copy (read and written), and of reading only
  DeviceClocks before, after;  // all rows
};

/// The CPU engine's rows: two threads.
void bench_cpu(BenchRun& run, const BenchPeers& peers);

/// The CUDA engine's rows. Throws CudaError without a device.
BenchDevice bench_device(BenchRun& run, const BenchPeers& peers);

}  // namespace kv
