// What comes with the next token, fetched into shared memory while the present one attends: nothing of a step waits for it.
#pragma once
#include "kernels/measure.cuh"

namespace kv {

/// By the warps that do not stream, each its share; close_copies(), await_copies<0>() and a barrier must follow. `streamed`: whether rows of
/// this shape go over tensor cores, `width`: of their streams, `absolute`: keys are at their own positions.
struct StepInputs {
  const Play& play;
  const TraceData& trace;  // and settings: the launch's, which are constants
  const PlaySettings& settings;
  bool streamed;
  int width;
  bool absolute;

  __device__ const void* key(int token) const {
    if (!streamed) return key_in_memory(token);
    return play.row.key + token % input_buffers * width;
  }
  __device__ const void* value(int token) const {
    if (!streamed) return value_in_memory(token);
    return play.row.value + token % input_buffers * width;
  }
  /// Full attention's output of head g for the m-th measured query, a token's.
  __device__ const float* full_output(int token, int g, int m) const {
    if (!streamed) return full_output_in_memory(g, m);
    return play.row.full + (token % input_buffers * trace.group + g) * trace.value_dim;
  }

  /// Starts the copies of a token whose measured query is the m-th (-1: none) and whose queries are row `row` of the layer's;
  /// `warp`: the warp's number among so many that fetch.
  __device__ void fetch(int token, int m, int row, int warp, int warps) const {
    const int lane = static_cast<int>(threadIdx.x % 32), group = trace.group;
    constexpr int element = 2;                                      // bytes: rows are streamed
    const auto copy = [&](void* to, const void* from, int bytes) {  // at most 512: streams are 128 channels wide
      if (lane < bytes / 16)
        copy_16(shared_address(to) + static_cast<unsigned>(lane) * 16, static_cast<const char*>(from) + lane * 16);
    };
    static_assert(team_warps - stream_warps > 2);  // the first may have books to keep
    if (warp == 0) copy(const_cast<void*>(key(token)), key_in_memory(token), trace.key_dim * element);
    if (warp == 1) copy(const_cast<void*>(value(token)), value_in_memory(token), trace.value_dim * element);
    const int pitch = query_pitch(width);
    const bool has_queries = absolute && row >= 0;
    const int first_row = play.query_head(0) * play.layer.query_rows + row;
#pragma unroll 1
    for (int g = warp; g < group; g += warps) {
      if (has_queries)
        copy(play.row.queries[token & 1] + g * pitch,
             static_cast<const char*>(play.layer.q_rotated) +
                 static_cast<long>(first_row + g * play.layer.query_rows) * (trace.key_dim * element),
             trace.key_dim * element);
      if (m >= 0) copy(const_cast<float*>(full_output(token, g, m)), full_output_in_memory(g, m), trace.value_dim * 4);
    }
  }

 private:
  __device__ const void* key_in_memory(int token) const {
    return in_memory(absolute ? play.layer.k_rotated : play.layer.k, token, trace.key_dim);
  }
  __device__ const void* value_in_memory(int token) const { return in_memory(play.layer.v, token, trace.value_dim); }
  __device__ const char* in_memory(const void* rows, int token, int dim) const {
    const int element = streamed ? 2 : bytes_of(trace.elements);
    return static_cast<const char*>(rows) +
           static_cast<long>(play.unit.info.kv_head * trace.tokens + token) * (dim * element);
  }
  __device__ const float* full_output_in_memory(int g, int m) const {
    return full_output_of(play.unit, play.layer, trace, {g, m, settings.measured_count, 0});
  }
};

}  // namespace kv
