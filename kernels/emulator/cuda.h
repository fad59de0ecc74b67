// What kernels/tile_map.hpp has of the driver's interface, for a machine without a GPU.
#pragma once
#include "kernels/emulator/machine.hpp"

using CUtensorMap = kv::emulator::TileMap;
