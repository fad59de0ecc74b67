// `kvreplay bench`: what the CUDA engine costs against what it cannot go below.
#pragma once
#include <filesystem>
#include <string>

namespace kv {

struct BenchOptions {
  std::string only;             // rows whose work contains it
  std::filesystem::path json;   // where to write the rows too; "" = nowhere
  std::filesystem::path peers;  // what tests/bench/peers.py wrote; "" = no peers
};

/// Prints a table. Throws CudaError without a device, ConfigError for files that cannot be read or written, and in the end
/// InternalError when a result was not right.
void bench(const BenchOptions& options);

}  // namespace kv
