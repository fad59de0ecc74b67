// The one kernel of a policy: a thread block plays a unit. Prompt blocks are played in stages, between which grid-wide
// kernels attend (kernels/block_attention.hpp); tokens that come alone are played through in one launch.
#pragma once
#include "kernels/steps.cuh"

namespace kv {

/// A struct, word by word, by all threads.
template <class T>
__device__ void copy_words(T* to, const T* from) {
  static_assert(sizeof(T) % 4 == 0);
  for (unsigned i = threadIdx.x; i < sizeof(T) / 4; i += team_threads)
    reinterpret_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
}

template <class P>
__global__ void __launch_bounds__(team_threads, 2) play_kernel(const __grid_constant__ Launch launch, const P* points) {
  extern __shared__ __align__(16) char memory[];
  __shared__ Fixed fixed;
  __shared__ __align__(16) unsigned char policy[sizeof(P)];
  const TraceData& trace = launch.trace;
  const bool streamed = streams(trace.elements, trace.key_dim, trace.value_dim, trace.group);
  // Under a cooperative launch whole layers are resident at a time; otherwise there is a block for every unit.
  for (int u = static_cast<int>(blockIdx.x); u < launch.unit_count; u += static_cast<int>(gridDim.x)) {
    const Unit* unit = launch.units + u;
    copy_words(&fixed.unit, unit);
    copy_words(&fixed.layer, launch.layers + unit->layer);
    for (unsigned i = threadIdx.x; i < sizeof(P); i += team_threads)
      policy[i] = reinterpret_cast<const unsigned char*>(points + unit->point)[i];
    if (threadIdx.x == 0) {
      fixed.trace = launch.trace, fixed.settings = launch.settings;
      fixed.row = carve_row(memory, streamed, trace.key_dim, trace.value_dim, trace.group);
      fixed.row.probabilities = unit->probabilities;
      fixed.units = launch.units, fixed.progress = launch.progress + u;
      const int row_bytes = row_memory_bytes(streamed, trace.key_dim, trace.value_dim, trace.group);
      fixed.logits = launch.shared_logits > 0 ? reinterpret_cast<float*>(memory + row_bytes) : unit->logits;
      fixed.logit_stride = launch.shared_logits > 0 ? launch.shared_logits : logit_stride(unit->capacity);
      fixed.streamed = streamed;
    }
    __syncthreads();
    Player<P> player(fixed, *reinterpret_cast<const P*>(policy));
    player.phase = launch.phase, player.block = launch.block, player.block_first = launch.first;
    player.now = (launch.probing ? launch.first : launch.last) - 1;
    if (launch.stage == Stage::steps)
      Steps<P>(launch, player).run();
    else
      Stages<P>(launch, player).run();
    __syncthreads();
    if (threadIdx.x == 0) fixed.progress->size = player.size;
    __syncthreads();
  }
}

}  // namespace kv
