// What a lane of a stream begins a row with, and whether that is near what comes.
#pragma once
#include "kernels/stream_look.cuh"

namespace kv {

/// What that reads of shared memory: at once, or each would be waited for.
struct StreamStart {
  uint4 lane;     // StreamMemory::lanes
  float2 most;    // what exponents of two heads are relative to before the first tile
  float* logits;  // of a RowLook
  int logit_stride;
  float scale;
  unsigned ring, probe;  // where rings and, where there is one, the probe's rows begin

  /// `first`: the lane's first head. `goes_on`: with the bases of the token before; else, and beyond the group, there are none.
  __device__ __forceinline__ StreamStart(const RowLook& look, const StreamMemory& memory, int group, int warp,
                                         int first, bool probes, bool goes_on)
      : most{-INFINITY, -INFINITY},
        logits(look.logits),
        logit_stride(look.logit_stride),
        scale(look.scale),
        ring(shared_address(memory.ring)),
        probe(probes ? shared_address(memory.probe.rows) : 0) {
    if (goes_on) most = *reinterpret_cast<const float2*>(memory.bases + warp * stream_heads + first);
    lane = memory.lanes[threadIdx.x % 32];
    __syncwarp();  // or the compiler puts these reads off
    if (goes_on) most = {first < group ? most.x : INFINITY, first + 1 < group ? most.y : INFINITY};
  }
};

/// What the exponents of a head are relative to, in units of log 2.
__device__ inline float base_of(float most) { return most == -INFINITY ? 0.f : most * log2_e; }

/// Whether every head has a slot whose logit is not far below its base before the first tile: a warp's lanes have the largest ones,
/// `most`, of two heads. Columns beyond the group have none.
__device__ __forceinline__ bool is_near(const float (&most)[2], const float (&bases)[2]) {
  constexpr float far = 40;  // exponents go down to -126 * ln 2
  unsigned near[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    near[e] = __ballot_sync(~0u, most[e] > bases[e] - far || bases[e] == INFINITY);
#pragma unroll
    for (int k = 16; k >= 4; k /= 2) near[e] |= near[e] >> k;
  }
  return (near[0] & near[1] & 15) == 15;
}

}  // namespace kv
