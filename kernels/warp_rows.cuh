// Who works on a row in kernels: a warp. Same results, to the bit, as RowTeam of policies/teams.hpp.
#pragma once
#include <cmath>

#include "kernels/elements.cuh"

namespace kv {

/// sum_of_chunks of policies/teams.hpp for several rows, a chunk a lane of the first of every `lanes` neighbours, to all of them; full
/// warps. Lanes beyond a row's chunks have zeros.
template <int rows>
__device__ void sum_over_lanes(float (&chunk)[rows], int dim, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  int n = min((dim + 7) / 8, lanes);
  if ((n & (n - 1)) == 0) {  // in one go with those lanes: zeros change nothing
#pragma unroll
    for (int k = 16; k > 0; k /= 2)
      if (k < lanes)
#pragma unroll
        for (float& sum : chunk) sum += __shfl_xor_sync(~0u, sum, k);
    return;
  }
#pragma unroll 1
  for (; n > 1; n = (n + 1) / 2)
#pragma unroll
    for (float& sum : chunk) {
      const float other = __shfl_down_sync(~0u, sum, static_cast<unsigned>((n + 1) / 2));
      if (lane < n / 2) sum += other;
    }
#pragma unroll
  for (float& sum : chunk) sum = __shfl_sync(~0u, sum, static_cast<int>(threadIdx.x % 32) - lane);
}

/// A warp as a row team.
struct WarpRows {
  template <class A, class B = DeviceRow>
  __device__ float dot(A a, B b) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float chunk[1] = {};
    if (in_eights(a) && in_eights(b)) {
#pragma unroll 1  // one turn, as a rule: more would be code to jump over
      for (int first = 8 * lane; first < a.dim; first += 8 * 32) {
        float x[8], y[8];
        load_eight(a, first, x), load_eight(b, first, y);
#pragma unroll
        for (int k = 0; k < 8; ++k) chunk[0] += x[k] * y[k];
      }
    } else {
#pragma unroll 1
      for (int first = 8 * lane; first < a.dim; first += 8 * 32)
        for (int k = first; k < min(first + 8, a.dim); ++k) chunk[0] += a[k] * b[k];
    }
    sum_over_lanes(chunk, a.dim, 32);
    return chunk[0];
  }
  template <class A, class B = DeviceRow>
  __device__ float cosine(A a, B b) const {
    const float norms = std::sqrt(dot(a, a)) * std::sqrt(dot(b, b));
    const float cosine = norms > 0 ? dot(a, b) / norms : 0.f;
    return cosine > 1 ? 1.f : cosine < -1 ? -1.f : cosine;
  }
  template <class A, class B = DeviceRow>
  __device__ float distance(A a, B b) const {
    float sum = 0;  // every member: a sum in the order of channels has no parallel form
    for (int c = 0; c < a.dim; ++c) sum += (a[c] - b[c]) * (a[c] - b[c]);
    return std::sqrt(sum);
  }
  template <class A>
  __device__ void add(float* vector, float weight, A row) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (in_eights(row) && reinterpret_cast<std::size_t>(vector) % 16 == 0) {
#pragma unroll 1
      for (int first = 8 * lane; first < row.dim; first += 8 * 32) {
        float x[8];
        load_eight(row, first, x);
        float4* const four = reinterpret_cast<float4*>(vector + first);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float4 sum = four[i];
          sum.x += weight * x[4 * i], sum.y += weight * x[4 * i + 1];
          sum.z += weight * x[4 * i + 2], sum.w += weight * x[4 * i + 3];
          four[i] = sum;
        }
      }
    } else {
#pragma unroll 1
      for (int c = lane; c < row.dim; c += 32) vector[c] += weight * row[c];
    }
    __syncwarp();
  }

 private:
  /// Whether a row can be read eight channels at a time; and eight of one that can.
  template <class A>
  __device__ static bool in_eights(const A& row) {
    if constexpr (requires { row.in_eights(); }) return row.in_eights();
    return false;
  }
  template <class A>
  __device__ static void load_eight(const A& row, int first, float (&x)[8]) {
    if constexpr (requires { row.in_eights(); }) row.load_eight(first, x);
  }
};

}  // namespace kv
