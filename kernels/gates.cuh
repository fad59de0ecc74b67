// Barriers of some of a team's warps, in shared memory. Named barriers would do as well, but where a kernel has them beside
// __syncthreads(), compute-sanitizer's racecheck loses sight of the latter.
#pragma once
#include "kernels/instructions.cuh"
#include "kernels/row_memory.hpp"

namespace kv {

/// What warps that part in a step tell each other: those who wait for it and those who only arrive come once a time.
enum class Gate {
  serving,               // those who do not stream: a slot that goes has been looked at, its place is closed
  gap_closed,            // the clerk waits until the others have closed the gap of a slot that went
  weights_known,         // of a row's probe: who streams waits for the clerk
  newest_weights_known,  // the same for the warp that has to do with the newest key, which may come late
  value_kept,            // the warp that folds waits for the one that has read the victim's value
  planned,               // the clerk waits until that warp knows the victim's target
  gap_may_close,         // the same for the warp that closes the victim's gap
};

struct Gates {
  uint64_t barriers[7];

  /// By one thread; a barrier must follow.
  __device__ void begin() {
    constexpr int warps[] = {team_warps - stream_warps, team_warps - stream_warps, stream_warps + 1, 2, 2, 2, 2};
    for (int i = 0; i < 7; ++i) barrier_init(shared_address(&barriers[i]), warps[i] * 32);
  }
  __device__ void end() {
    for (uint64_t& barrier : barriers) barrier_end(shared_address(&barrier));
  }
  /// By all lanes of a warp, as racecheck credits an arrival to the lane that gives it.
  __device__ void arrive(Gate gate) { barrier_arrive(shared_address(&barriers[static_cast<int>(gate)])); }
  __device__ void pass(Gate gate) { barrier_arrive_and_wait(shared_address(&barriers[static_cast<int>(gate)])); }
};

}  // namespace kv
