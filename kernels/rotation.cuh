// Rotary rotation of rows, the same arithmetic in every kernel: RopeTable::rotate, bit for bit.
#pragma once
#include "kernels/elements.cuh"
#include "kernels/unit.hpp"

namespace kv {

/// Pairs, and channels beyond them, that a thread takes at a time: 8 or 1.
__device__ inline int turned_at_once(const Rotation& r) {
  return in_eights(r.elements, r.dim) && r.pairs % 8 == 0 ? 8 : 1;
}
/// Pieces of a row: `width` pairs each, then `width` channels that do not turn.
__device__ inline int pieces_of_row(const Rotation& r, int width) { return (r.dim - r.pairs) / width; }

__device__ inline Rotation rotation_of(const TraceData& trace, const LayerData& layer) {
  return {trace.elements, layer.rope_step, trace.key_dim, trace.pairs, trace.half_style};
}

/// Neighbouring floats; 8 at a multiple of 16 bytes.
template <int width>
__device__ void load_floats(const float* from, float (&x)[width]) {
  if constexpr (width == 1)
    x[0] = *from;
  else
#pragma unroll
    for (int k = 0; k < width; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + k);
      x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
    }
}

/// One piece of row `in`, rotated by cos[pairs] and sin[pairs], into row `out`.
template <int width>
__device__ void rotate_piece(const Rotation& r, const float* cos, const float* sin, const void* in, void* out,
                             int piece) {
  const int turning = r.pairs / width, i = piece * width;
  float a[width], b[width];
  if (piece >= turning) {
    load_channels(in, r.elements, r.pairs + i, a);
    store_channels(out, r.elements, r.pairs + i, a);
    return;
  }
  const int first = r.half_style ? i : 2 * i, second = r.half_style ? i + r.pairs : 2 * i + width;
  load_channels(in, r.elements, first, a);
  load_channels(in, r.elements, second, b);
  float c[width], s[width];
  load_floats(cos + i, c);
  load_floats(sin + i, s);
  const auto round = [&](float x) { return round_as(r.step, x); };
  const auto turn = [&](float& x, float& y, int k) {
    const float before = x;
    x = round(round(x * c[k]) + round(-y * s[k]));
    y = round(round(y * c[k]) + round(before * s[k]));
  };
  if (r.half_style || width == 1) {
#pragma unroll
    for (int k = 0; k < width; ++k) turn(a[k], b[k], k);
  } else {
#pragma unroll
    for (int k = 0; k < width / 2; ++k) turn(a[2 * k], a[2 * k + 1], k), turn(b[2 * k], b[2 * k + 1], k + width / 2);
  }
  store_channels(out, r.elements, first, a);
  store_channels(out, r.elements, second, b);
}

/// A row to rotate: none where `in` is null.
struct TurnedRow {
  const float *cos = nullptr, *sin = nullptr;  // [pairs]
  const void* in = nullptr;
  void* out = nullptr;
};

/// row_of(i) of every i < n rotated, by one of `parts` blocks of threads: a few neighbouring threads a row. done(i) by one of
/// them, after all have asked row_of(i).
template <class RowOf, class Done>
__device__ void turn_rows(const Rotation& r, long n, unsigned part, unsigned parts, RowOf row_of, Done done) {
  const int width = turned_at_once(r), pieces = pieces_of_row(r, width);
  int lanes = 1;  // of a row
  while (lanes < pieces && lanes < 32) lanes *= 2;
  const int lane = static_cast<int>(threadIdx.x) % lanes, rows = static_cast<int>(blockDim.x) / lanes;
  for (long first = static_cast<long>(part) * rows; first < n; first += static_cast<long>(parts) * rows) {
    const long i = first + static_cast<int>(threadIdx.x) / lanes;
    const TurnedRow row = i < n ? row_of(i) : TurnedRow{};
    __syncwarp();
    if (row.in == nullptr) continue;
    for (int piece = lane; piece < pieces; piece += lanes)
      width == 8 ? rotate_piece<8>(r, row.cos, row.sin, row.in, row.out, piece)
                 : rotate_piece<1>(r, row.cos, row.sin, row.in, row.out, piece);
    if (lane == 0) done(i);
  }
}

}  // namespace kv
