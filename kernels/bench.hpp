// What the CUDA engine costs against what it cannot go below: `kvreplay bench` prints it. Every row is checked before it
// is timed, and is a ratio to a rate of the same machine.
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
  double ratio() const { return us / floor_us; }
};

/// What other programs do on the same machine in the same run (tests/bench/peers.py); 0 = not known.
struct BenchPeers {
  double gemm_flops = 0;        // per second of a large bfloat16 matrix product
  double attention_16k_us = 0;  // cuDNN's full causal attention, 16384 tokens, 32 query and 8 KV heads of 128
  double eager_h2o_us = 0;      // a token of H2O at 1024 slots in eager PyTorch, one layer
};

struct BenchResult {
  std::string device;
  double copy = 0, read = 0;  // bytes per second of a large copy (read and written), and of reading only
  std::vector<BenchRow> rows;
  std::string failure;  // of the first work whose result was not right, which has no row; "" when all were
};

/// Runs the rows whose work contains `only` ("" = all), telling `finished` of each. Throws CudaError without a device.
BenchResult bench_device(const std::string& only, const BenchPeers& peers,
                         const std::function<void(const BenchRow&)>& finished);

}  // namespace kv
