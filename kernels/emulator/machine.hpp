// A GPU made of fibers: every CUDA thread is one, and goes on until it meets others (a barrier, a shuffle, a tensor product).
// Who runs next is drawn at random, asynchronous copies land at once or at the last moment: what a kernel forgot to wait for
// shows here sooner than on a real device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace kv::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Block;
struct Warp;

/// What a thread of a kernel knows of itself.
struct Thread {
  Index index;
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
};

extern thread_local Thread* here;  // the thread that runs

const Index& block_index();
const Index& block_size();
const Index& grid_size();

/// What each of a warp's 32 lanes brought to a meeting, and what the last one made of it; valid until the thread's next one.
struct alignas(64) Meeting {
  unsigned char brought[32][32];
  float product[16][128];

  template <class T>
  const T& of(int lane) const {
    return *reinterpret_cast<const T*>(brought[lane % 32]);
  }
};

/// The warp's next meeting.
Meeting& next_meeting();
/// Waits there until all lanes of the warp are at this `what`; `last` is called first by the last of them. Throws
/// std::logic_error when they never will be.
void meet_warp(const char* what, void (*last)(Meeting&));

template <class T>
const Meeting& meet_warp(const char* what, const T& bring, void (*last)(Meeting&) = nullptr) {
  Meeting& meeting = next_meeting();
  static_assert(sizeof(T) <= sizeof meeting.brought[0]);
  *reinterpret_cast<T*>(meeting.brought[here->lane]) = bring;
  meet_warp(what, last);
  return meeting;
}

/// A barrier of the block; whether any thread brought true. Throws std::logic_error when a thread never comes.
bool meet_block(bool bring);

/// Hopper's barriers in shared memory, and those that have a number: `threads` wait or only arrive.
void barrier_init(std::uint32_t barrier, int arrivals);
void barrier_arrive(std::uint32_t barrier, unsigned expected_bytes);
bool barrier_passed(std::uint32_t barrier, int parity);
void barrier_wait(std::uint32_t barrier, int parity);
void named_wait(int id, int threads);
void named_arrive(int id, int threads);

/// The block's shared memory, and addresses in it and in what kernels declare. Throws std::logic_error for what is not in
/// there.
char* launch_memory();
std::uint32_t shared_address(const void* p);
char* at_shared(std::uint32_t address, std::size_t bytes);

/// The thread's asynchronous copies: `from` null for zeros.
void start_copy(std::uint32_t to, const void* from, std::size_t bytes);
void close_copies();
void await_copies(unsigned pending);

/// What kernels/tile_map.hpp has to say, and copy_box from there.
struct TileMap {
  const char* first;
  int dim, rows;
  std::size_t unit_bytes, units;
  int tile;  // rows of a box
};
constexpr int box_channels = 64;
/// An element of a box, counted from its first one; 0 beyond the rows. Throws std::logic_error for a unit that is not there.
std::uint16_t element_of_box(const TileMap& map, int channel, int row, int unit);
void start_box(std::uint32_t to, const TileMap& from, int channel, int row, int unit, std::uint32_t barrier);

/// Between blocks: what adds to a number that others wait for says so, and loops that wait for it throw std::logic_error when
/// nobody adds any more, std::runtime_error when another block has failed.
void tell_others();
void wait_a_moment();

/// Other turns for the launches to come; 0 at first.
void draw_by(unsigned seed);

/// The most bytes of device memory that were taken at once since the last call.
std::size_t most_device_bytes();

/// Runs `kernel` by every thread of a grid, `together`: with all blocks under way at once. Rethrows what a thread throws.
void run(Index grid, int threads, std::size_t shared_bytes, bool together, const std::function<void()>& kernel);

}  // namespace kv::emulator
