// A policy's vector beside the queries of a stream: the product of every key with it (trait key_probe).
//
// A step's stream begins before the hooks of rows have made its vector: on_evict of the slot that went last and on_append of
// the newest token read rows, sum up and divide, one after the other, and a stream that waits for them waits for the longest
// chain of a step. So the vector of the step before goes along, as two rows of elements, and these two keys as rows of their
// own; how much of each the hooks have added is known before a warp has done with more than two tiles. Whatever else a hook may
// have done to the vector is found out: then the keys are read again.
#pragma once
#include "kernels/gates.cuh"
#include "kernels/tensor_words.cuh"
#include "kernels/warp_rows.cuh"

namespace kv {

/// How that goes along with a stream: not, in the places of queries that a group of four heads leaves free, or with products of
/// its own.
enum class Probing { none, among_queries, apart };

/// What a stream needs for it, in shared memory.
struct KeyProbe {
  char* rows = nullptr;        // the vector in parts, and what else probe_row_bytes() counts
  alignas(8) float weight[2];  // how much of the key that went, and of the newest one, the vector has beside its parts
  bool holds;                  // and nothing else
  bool moved;                  // the vector has changed since its parts were made, until the end of the next row

  __device__ void* parts_of(int token, int width) const { return rows + (token & 1) * probe_turn(width); }
  __device__ void* gone_key(int width) const { return rows + probe_gone(width); }
  __device__ void* gone_value(int width) const { return rows + probe_value(width); }
  __device__ float2* vector(int width) const { return reinterpret_cast<float2*>(rows + probe_vector(width)); }
};

/// A warp as a row team that remembers how much of one key it has added to the policy's vector.
struct ProbeRows : WarpRows {
  const float* vector;
  const void* key;
  float* weight;
  template <class A>
  __device__ void add(float* to, float by, A row) const {
    if constexpr (requires { row.data; })
      if (to == vector && row.data == key) *weight += by;
    WarpRows::add(to, by, row);
  }
};

namespace detail {

/// Two neighbouring channels of a row of elements, the i-th ones.
template <class Element>
__device__ float2 pair_of(const void* row, int i) {
  return Words<Element>::unpack(static_cast<const unsigned*>(row)[i]);
}

/// Fills a token's rows with parts of the vector, whose sum it is to 2^-18 of each channel: of pairs of channels, 64 to a turn of
/// the warp. Keeps the vector.
template <class Element, int width>
__device__ void split_pairs(const KeyProbe& probe, float2 (&x)[width / 64], int token) {
  unsigned* const parts = static_cast<unsigned*>(probe.parts_of(token, width));
#pragma unroll
  for (int t = 0; t < width / 64; ++t) probe.vector(width)[threadIdx.x % 32 + 32 * t] = x[t];
#pragma unroll
  for (int part = 0; part < probe_parts; ++part)
#pragma unroll
    for (int t = 0; t < width / 64; ++t) {
      const unsigned word = Words<Element>::pack(x[t].x, x[t].y);
      const float2 taken = Words<Element>::unpack(word);
      x[t].x -= taken.x, x[t].y -= taken.y;
      parts[part * query_pitch(width) / 2 + static_cast<int>(threadIdx.x % 32) + 32 * t] = word;
    }
}

}  // namespace detail

/// Where this lane's row of the operand of a RowNow begins: of two parts of the vector, the newest key, the one that went last;
/// twice. `rows`: where KeyProbe::rows are.
template <int width, class Now>
__device__ unsigned probe_row_of_lane(unsigned rows, const Now& row) {
  const unsigned lane = threadIdx.x % 32, which = lane % 4, newest = shared_address(row.newest_key);
  const unsigned part = static_cast<unsigned>(row.query_token & 1) * probe_turn(width) + which * query_pitch(width) * 2;
  return (which == 2 ? newest : rows + (which == 3 ? probe_gone(width) : part)) + lane / 8 * 16;
}
/// Where a lane's products of a tile lie in [slots][4], in bytes.
__device__ inline unsigned product_of_lane() {
  const unsigned lane = threadIdx.x % 32;
  return lane / 4 * 16 + lane % 2 * 8;
}
/// Puts away a tile's products from product_of_lane() on: a lane has a pair of the slots of its row, neighbours of two the same.
template <int row_blocks>
__device__ void store_products(unsigned at, const float (&products)[row_blocks][4]) {
#pragma unroll
  for (unsigned m = 0; m < row_blocks; ++m)
#pragma unroll
    for (unsigned h = 0; h < 2; ++h)
      store_shared(at + (m * 16 + h * 8) * 16, float2{products[m][2 * h], products[m][2 * h + 1]});
}
/// What a key gives with the vector as hooks have made it, from its products with the operand's rows.
__device__ inline float probe_of(const KeyProbe& probe, const float4& products) {
  const auto& x = products;
  return x.x + x.y + (probe.weight[0] * x.w + probe.weight[1] * x.z);
}
/// The same of the lane's slot of a tile; lanes that have none get another's.
template <int tile>
__device__ float probe_of_lane(const KeyProbe& probe, unsigned products) {
  return probe_of(probe, load_shared(products + threadIdx.x % tile * 16));
}

/// The same of the newest key, which no tile has; by one warp, to all its lanes. Waits until weights are known.
template <class Element, int width, class Now>
__device__ float probe_of_newest(const KeyProbe& probe, const Now& row, Gates& gates) {
  const auto* const parts = static_cast<const std::uint16_t*>(probe.parts_of(row.query_token, width));
  const void* const rows[] = {parts, parts + query_pitch(width), row.newest_key, probe.gone_key(width)};
  float sum[4] = {};
#pragma unroll
  for (int t = 0; t < width / 64; ++t) {
    const int i = static_cast<int>(threadIdx.x % 32) + 32 * t;
    const float2 key = detail::pair_of<Element>(row.newest_key, i);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 x = detail::pair_of<Element>(rows[r], i);
      sum[r] += key.x * x.x + key.y * x.y;
    }
  }
  sum_over_lanes(sum, 8 * 32, 32);
  gates.pass(Gate::newest_weights_known);
  return probe_of(probe, {sum[0], sum[1], sum[2], sum[3]});
}

/// The vector goes along with the row of a token as it is. By one warp; a barrier must follow.
template <class Element, int width>
__device__ void place_probe(KeyProbe& probe, const float* vector, int key_dim, int token) {
  float2 x[width / 64];
  for (int t = 0; t < width / 64; ++t) {
    const int i = static_cast<int>(threadIdx.x % 32) + 32 * t;
    x[t] = 2 * i < key_dim ? reinterpret_cast<const float2*>(vector)[i] : float2{0, 0};
  }
  detail::split_pairs<Element, width>(probe, x, token);
  if (threadIdx.x % 32 == 0) probe.weight[0] = probe.weight[1] = 0, probe.holds = true;
}

/// The hooks of a token's step have made the vector what it is: whether its row, which is under way, finds that by its parts
/// and weights, and the parts for the next row. By one warp; a barrier must follow.
template <class Element, int width>
__device__ void settle_probe(KeyProbe& probe, const float* vector, int key_dim, int token, const void* newest_key) {
  constexpr int turns = width / 64;
  const float gone = probe.weight[0], newest = probe.weight[1];
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool holds = true;
  float2 x[turns], sum[turns];
#pragma unroll
  for (int t = 0; t < turns; ++t) {
    const int i = lane + 32 * t;
    const bool there = 2 * i < key_dim;
    x[t] = there ? reinterpret_cast<const float2*>(vector)[i] : float2{0, 0};
    sum[t] = probe.vector(width)[i];
    const auto add = [&](float weight, const float2& y) { sum[t].x += weight * y.x, sum[t].y += weight * y.y; };
    add(gone, detail::pair_of<Element>(probe.gone_key(width), i)), add(newest, detail::pair_of<Element>(newest_key, i));
    holds = holds & (sum[t].x == x[t].x) & (sum[t].y == x[t].y);
  }
  detail::split_pairs<Element, width>(probe, x, token + 1);
  holds = __all_sync(~0u, holds);
  if (lane == 0) probe.holds = holds;
}

}  // namespace kv
