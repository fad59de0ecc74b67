// What the hardware of Hopper and later knows of an array of rows that it copies boxes from (copy_box).
#pragma once
#include <cuda.h>

#include <cstddef>

namespace kv {

/// Rows of 16-bit elements, unit by unit.
struct TileMap {
  CUtensorMap map;
};

/// The map of `units` arrays of [rows][dim] elements, `unit_bytes` apart; an empty one on a GPU that copies no boxes. Boxes are
/// `tile` rows of 64 channels. Throws CudaError.
TileMap make_tile_map(const void* first, int dim, int rows, std::size_t unit_bytes, std::size_t units, int tile);

}  // namespace kv
