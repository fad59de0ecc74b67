// How long work takes on the device.
#pragma once
#include <vector>

#include "kernels/streams.hpp"

namespace kv {

/// Microseconds of `repeats` passes by events, after two that do not count; `before` each, untimed.
template <class Work, class Before>
std::vector<double> event_times(int repeats, Work work, Before before) {
  Event begin, end;
  std::vector<double> us;
  for (int repeat = 0; repeat < repeats + 2; ++repeat) {
    before();
    begin.record(nullptr);
    work();
    end.record(nullptr);
    KV_CUDA_TRY(cudaEventSynchronize(end.id));
    if (repeat > 1) us.push_back(end.since(begin) * 1e6);
  }
  return us;
}

template <class Work>
std::vector<double> event_times(int repeats, Work work) {
  return event_times(repeats, work, [] {});
}

}  // namespace kv
