// How fast the current device moves memory.
#pragma once

namespace kv {

/// Bytes per second: of a large copy, counting what is read and what is written, and of reading alone.
struct Bandwidth {
  double copy = 0, read = 0;
};

/// Medians of several passes over 2 GiB. Throws CudaError.
Bandwidth measure_bandwidth();

}  // namespace kv
