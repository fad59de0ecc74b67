// kernels/instructions.cuh by a machine without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/tile_map.hpp"

namespace kv {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

inline uint32_t pack_bfloat16(float low, float high) {
  return static_cast<uint32_t>(__float2bfloat16_rn(high).word) << 16 | __float2bfloat16_rn(low).word;
}
inline uint32_t pack_half(float low, float high) {
  return static_cast<uint32_t>(__float2half_rn(high).word) << 16 | __float2half_rn(low).word;
}

namespace emulator {

inline float as_bfloat16(std::uint16_t word) { return __bfloat162float({word}); }
inline float as_half(std::uint16_t word) { return __half2float({word}); }

struct Operands {
  uint32_t a[4], b[2];
};

/// A's and B's elements lie in the lanes as kernels/instructions.cuh says, k in pairs: lane 4 i + k % 8 / 2 has those of row
/// or column i.
template <float (*widen)(std::uint16_t)>
void multiply_all(Meeting& meeting) {
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& mine = meeting.of<Operands>(lane);
    for (int i = 0; i < 8; ++i) {
      const int k = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      a[lane / 4 + i / 2 % 2 * 8][k] = widen(static_cast<std::uint16_t>(mine.a[i / 2] >> i % 2 * 16));
    }
    for (int i = 0; i < 4; ++i)
      b[i / 2 * 8 + 2 * (lane % 4) + i % 2][lane / 4] = widen(static_cast<std::uint16_t>(mine.b[i / 2] >> i % 2 * 16));
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) meeting.product[row][column] = d[row][column];
}

template <float (*widen)(std::uint16_t)>
void multiply(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = here->lane;
  const Meeting& all = meet_warp(what, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, multiply_all<widen>);
  for (int i = 0; i < 4; ++i) d[i] += all.product[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

template <bool turned>
uint4 matrices(const char* what, uint32_t address) {
  const int lane = here->lane;
  const Meeting& rows = meet_warp(what, address);
  uint32_t words[4];
  for (int m = 0; m < 4; ++m) {
    const auto element = [&](int row, int column) -> uint32_t {
      const char* at = at_shared(rows.of<uint32_t>(8 * m + row), 16);
      return reinterpret_cast<const std::uint16_t*>(at)[column];
    };
    const int along = lane / 4, first = 2 * (lane % 4);
    words[m] = turned ? element(first + 1, along) << 16 | element(first, along)
                      : element(along, first + 1) << 16 | element(along, first);
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace emulator

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply<emulator::as_bfloat16>("mma_bfloat16", d, a, b0, b1);
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply<emulator::as_half>("mma_half", d, a, b0, b1);
}

using emulator::shared_address;
inline void store_shared(uint32_t address, float x) { *reinterpret_cast<float*>(emulator::at_shared(address, 4)) = x; }
inline void store_shared(uint32_t address, uint4 x) { *reinterpret_cast<uint4*>(emulator::at_shared(address, 16)) = x; }
inline void store_shared(uint32_t address, float2 x) {
  *reinterpret_cast<float2*>(emulator::at_shared(address, 8)) = x;
}
inline float4 load_shared(uint32_t address) { return *reinterpret_cast<float4*>(emulator::at_shared(address, 16)); }
inline void count_one(uint32_t address, bool counts) {
  if (counts) ++*reinterpret_cast<std::uint32_t*>(emulator::at_shared(address, 4));
}
inline uint4 load_matrices(uint32_t address) { return emulator::matrices<false>("load_matrices", address); }
inline uint4 load_turned(uint32_t address) { return emulator::matrices<true>("load_turned", address); }
inline uint32_t turn_matrix(uint32_t x) {
  const int lane = emulator::here->lane;
  const emulator::Meeting& all = emulator::meet_warp("turn_matrix", x);
  const auto element = [&](int row) -> uint32_t {  // of column lane / 4
    return all.of<uint32_t>(4 * row + lane / 8) >> lane / 4 % 2 * 16 & 0xffff;
  };
  return element(2 * (lane % 4) + 1) << 16 | element(2 * (lane % 4));
}

constexpr uint64_t stay_as_usual = 0, stay_long = 1, go_first = 2;
inline void copy_16(uint32_t to, const void* from) { emulator::start_copy(to, from, 16); }
inline void copy_16(uint32_t to, const void* from, bool real) { emulator::start_copy(to, real ? from : nullptr, 16); }
inline void copy_4(uint32_t to, const void* from, bool real) { emulator::start_copy(to, real ? from : nullptr, 4); }
inline void prefetch_line(const void*) {}
inline void close_copies() { emulator::close_copies(); }
template <int pending>
void await_copies() {
  emulator::await_copies(pending);
}

template <class T>
T& by_kept_address(T& object) {
  return object;
}
constexpr bool copies_boxes = true;
inline void copy_box(uint32_t to, const TileMap* from, int channel, int row, int unit, uint32_t barrier, uint64_t) {
  emulator::start_box(to, from->map, channel, row, unit, barrier);
}
inline bool is_elected() { return emulator::here->lane == 0; }
inline void written_to_device(bool = true) {}
inline void written_to_shared() {}
using emulator::barrier_init;
inline void barrier_end(uint32_t) {}
inline void barriers_ready() {}
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, unsigned bytes) { emulator::barrier_arrive(barrier, bytes); }
using emulator::barrier_passed;
using emulator::barrier_wait;
inline void barrier_arrive_and_wait(uint32_t barrier) {
  const int phase = barrier_passed(barrier, 0) ? 1 : 0;
  barrier_arrive(barrier);
  barrier_wait(barrier, phase);
}
inline void named_wait(int id, int threads) { emulator::named_wait(id, threads); }
inline void named_arrive(int id, int threads) { emulator::named_arrive(id, threads); }

inline void add_release(int* to, int x) {
  std::atomic_ref(*to).fetch_add(x, std::memory_order_release);
  emulator::tell_others();
}
inline int load_acquire(int* from) { return std::atomic_ref(*from).load(std::memory_order_acquire); }
using emulator::wait_a_moment;

}  // namespace kv
