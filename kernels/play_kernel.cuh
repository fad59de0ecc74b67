// The kernels of a policy, in which a thread block plays a unit: a stage of a prompt block, between which grid-wide kernels
// attend (kernels/block_attention.hpp), and all steps of tokens that come alone.
#pragma once
#include "kernels/launch.cuh"
#include "kernels/steps.cuh"

namespace kv {

/// A struct, word by word, by all threads.
template <class T>
__device__ void copy_words(T* to, const T* from) {
  static_assert(sizeof(T) % 4 == 0);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < sizeof(T) / 4; i += team_threads)
    reinterpret_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
}

/// play(fixed, policy, memory beyond a row's) for every unit of a launch; returns the slots that are then in the cache.
template <class P, class Play>
__device__ void play_units(const Launch& launch, const P* points, Play play) {
  char* const memory = launch_memory<1024>();  // a ring's addresses turn by bits
  constexpr std::size_t before_policy = (sizeof(Fixed) + 15) / 16 * 16;
  __shared__ __align__(16) char block_memory[before_policy + sizeof(P)];
  char* const shared = &by_kept_address(block_memory[0]);
  Fixed& fixed = *reinterpret_cast<Fixed*>(shared);
  unsigned char* const policy = reinterpret_cast<unsigned char*>(shared + before_policy);
  const TraceData& trace = launch.trace;
  const bool streamed = streams(trace.elements, trace.key_dim, trace.value_dim, trace.group);
  const int width = stream_width(trace.key_dim, trace.value_dim);
  // Under a cooperative launch whole layers are resident at a time; otherwise there is a block for every unit.
  for (int u = static_cast<int>(blockIdx.x); u < launch.unit_count; u += static_cast<int>(gridDim.x)) {
    const Unit* unit = launch.units + u;
    copy_words(&fixed.unit, unit);
    copy_words(&fixed.layer, launch.layers + unit->layer);
    copy_words(&fixed.progress, launch.progress + u);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < sizeof(P); i += team_threads)
      policy[i] = reinterpret_cast<const unsigned char*>(points + unit->point)[i];
    if (threadIdx.x == 0) {
      fixed.trace = launch.trace, fixed.settings = launch.settings;
      carve_row(fixed.row, memory, streamed, trace.key_dim, trace.value_dim, trace.group, launch.probes,
                launch.ring_bytes);
      fixed.row.probabilities = unit->probabilities;
      fixed.units = launch.units, fixed.maps = &launch.maps, fixed.unit_index = u;
      fixed.logits = unit->logits, fixed.logit_stride = logit_stride(unit->capacity);
      fixed.keeps_logits = !streamed || keeps_logits<P>(points[unit->point].traits(), launch.settings);
      fixed.streamed = streamed, fixed.tile = tile_slots(width, launch.ring_bytes);
    }
    if (streamed) begin_barriers(fixed.row.stream);
    __syncthreads();
    if (streamed && threadIdx.x < 32) TileRing::fill_lanes(fixed.row.stream, width, fixed.tile);
    if (streamed)
      clear_parts(fixed.row,
                  fixed.layer.sink_logit ? fixed.layer.sink_logit + unit->info.kv_head * trace.group : nullptr,
                  trace.group);
    const int row_bytes =
        row_memory_bytes(streamed, trace.key_dim, trace.value_dim, trace.group, launch.probes, launch.ring_bytes);
    const int size = play(fixed, *reinterpret_cast<const P*>(policy), memory + row_bytes);
    __syncthreads();
    if (threadIdx.x == 0) fixed.progress.size = size;
    __syncthreads();
    copy_words(launch.progress + u, &fixed.progress);
    if (streamed) end_barriers(fixed.row.stream);
    __syncthreads();
  }
}

template <class P>
__global__ void __launch_bounds__(team_threads, 2)
    stage_kernel(const __grid_constant__ Launch launch, const P* points) {
  play_units(launch, points, [&](Fixed& fixed, const P& policy, char*) {
    Stages<P> stages(launch, fixed, policy);
    stages.run();
    return stages.size();
  });
}

/// `width`, `tile`: launch.plain_width and the slots of a tile there, or 0.
template <class P, int width, int tile>
__global__ void __launch_bounds__(team_threads, 2) step_kernel(const __grid_constant__ Launch launch, const P* points) {
  play_units(launch, points, [&](Fixed& fixed, const P& policy, char* memory) {
    const StepRecords<P> records(fixed, policy.traits(), memory, launch.record_bytes, launch.step_slots);
    Steps<P, width, tile> steps(launch, fixed, policy);
    steps.run();
    __syncthreads();
    records.give_back(steps.size());
    return steps.size();
  });
}

}  // namespace kv
