// A row streamed where its types are known at run time.
#pragma once
#include "kernels/stream_attention.cuh"

namespace kv {

/// Streams a row, by the first stream_warps warps. Leaves parts and partial sums in `memory`; a barrier must follow.
template <class Element, int width, int tile, Probing probing>
__device__ __forceinline__ void stream_here(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                            const Ring& ring) {
  Stream<Element, width, tile, probing> stream(look, now, memory, look.from, look.kept_tiles, same_in_warp(look.group),
                                               warp_of_team());
  stream.start(ring);
  stream.run(ring);
}

/// The same as a call, which has to save a register for each that it takes: for rows that are not the many.
template <class Element, int width>
__device__ __noinline__ void stream_row(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                        const Ring& ring) {
  constexpr int tile = tile_slots(width, short_ring);
  if (look.probe_vector)
    stream_here<Element, width, tile, Probing::apart>(look, now, memory, ring);
  else
    stream_here<Element, width, tile, Probing::none>(look, now, memory, ring);
}

/// stream_row() of rows stored as `elements`, 16 bits each.
__device__ __forceinline__ void stream_apart(Dtype elements, const RowLook& look, const RowNow& now,
                                             StreamMemory& memory, const Ring& ring) {
  const bool half = elements == Dtype::float16, wide = stream_width(look.key_dim, look.value_dim) > 64;
  if (half && wide)
    stream_row<__half, 128>(look, now, memory, ring);
  else if (half)
    stream_row<__half, 64>(look, now, memory, ring);
  else if (wide)
    stream_row<__nv_bfloat16, 128>(look, now, memory, ring);
  else
    stream_row<__nv_bfloat16, 64>(look, now, memory, ring);
}

}  // namespace kv
