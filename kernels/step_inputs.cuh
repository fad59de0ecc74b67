// What comes with the next token, fetched into shared memory while the present one attends: nothing of a step waits for it.
#pragma once
#include "kernels/measure.cuh"

namespace kv {

/// By the warps that do not stream, each its share; close_copies(), await_copies<0>() and a barrier must follow. `streamed`: whether rows of
/// this shape go over tensor cores, `width`: of their streams.
struct StepInputs {
  const Play& play;
  bool streamed;
  int width;

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
    if (!streamed) return full_output_of(play.fixed, g, m);
    return play.row.full + (token % input_buffers * play.trace.group + g) * play.trace.value_dim;
  }

  /// Starts the copies of a token whose measured query is the m-th (-1: none) and whose queries are row `row` of the layer's;
  /// `warp`: the warp's number among those that do not stream.
  __device__ void fetch(int token, int m, int row, int warp) const {
    const TraceData& t = play.trace;
    const int lane = static_cast<int>(threadIdx.x % 32), group = t.group;
    const auto copy = [&](void* to, const void* from, int bytes) {  // at most 512: streams are 128 channels wide
      if (lane < bytes / 16)
        copy_16(shared_address(to) + static_cast<unsigned>(lane) * 16, static_cast<const char*>(from) + lane * 16);
    };
    static_assert(team_warps - stream_warps > 2);  // the first has books to keep
    if (warp == 1) copy(const_cast<void*>(key(token)), key_in_memory(token), t.key_dim * 2);
    if (warp == 2) copy(const_cast<void*>(value(token)), value_in_memory(token), t.value_dim * 2);
    const int pitch = query_pitch(width);
#pragma unroll 1
    for (int g = warp; g < group; g += team_warps - stream_warps) {
      if (play.absolute() && row >= 0) {
        const char* from = play.at(play.layer.q_rotated,
                                   static_cast<long>(play.query_head(g)) * play.layer.query_rows + row, t.key_dim);
        std::uint16_t* const to = play.row.queries[token & 1] + g * pitch;
        copy(to, from, t.key_dim * 2);
      }
      if (m >= 0) copy(const_cast<float*>(full_output(token, g, m)), full_output_of(play.fixed, g, m), t.value_dim * 4);
    }
  }

 private:
  __device__ const void* key_in_memory(int token) const {
    return play.at(play.absolute() ? play.layer.k_rotated : play.layer.k,
                   static_cast<long>(play.unit.info.kv_head) * play.trace.tokens + token, play.trace.key_dim);
  }
  __device__ const void* value_in_memory(int token) const {
    return play.at(play.layer.v, static_cast<long>(play.unit.info.kv_head) * play.trace.tokens + token,
                   play.trace.value_dim);
  }
};

}  // namespace kv
