// `kvreplay bench`: what the engines cost against what they cannot go below.
#pragma once
#include <filesystem>
#include <string>

namespace kv {

struct BenchOptions {
  std::string only;             // rows whose work contains it
  std::filesystem::path json;   // where to write the rows too; "" = nowhere
  std::filesystem::path peers;  // what tests/bench/peers.py wrote; "" = no peers
};

/// Prints a table. Throws ConfigError for files that cannot be read or written, and in the end InternalError when a result
/// was not right, CudaError when there is no device: the table then has the CPU engine's rows only.
void bench(const BenchOptions& options);

}  // namespace kv
