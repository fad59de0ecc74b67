// kernels/hopper_instructions.cuh by a machine without a GPU. Products are there at once.
#pragma once
#include <type_traits>

#include "kernels/instructions.cuh"

#define KV_HOPPER 1

namespace kv::blocks {

inline void publish_copies() {
  close_copies();
  await_copies<0>();
}

template <int step>
void copy_four(const uint32_t (&to)[4], const void* from) {
  for (int i = 0; i < 4; ++i) copy_16(to[i] + step * 1024, static_cast<const char*>(from) + step * 2048 + 512 * i);
}

template <int count>
void more_registers() {}
template <int count>
void fewer_registers() {}
inline void products_begin() {}
inline void products_end() {}
template <int pending>
void await_products() {}

using Accumulators = float[16][4];
inline void pin(Accumulators&) {}
inline void pin(float (&)[2]) {}

inline uint64_t operand(uint32_t address, int leading, int stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32;
}
/// The operand that lies some bytes further on.
inline uint64_t further(uint64_t operand, int bytes) { return operand + static_cast<uint64_t>(bytes >> 4); }

namespace emulated {

template <class Element>
float element_at(uint32_t address) {
  const uint32_t swizzled = address ^ (address >> 7 & 7) << 4;
  const auto word = *reinterpret_cast<const std::uint16_t*>(emulator::at_shared(swizzled, 2));
  return std::is_same_v<Element, __half> ? emulator::as_half(word) : emulator::as_bfloat16(word);
}

/// Where element k of row i lies, and element i of row k when rows lie along the product.
inline uint32_t place(uint64_t operand, int i, int k) {
  const auto start = static_cast<uint32_t>(operand & 0x3fff) << 4,
             stride = static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4;
  return start + static_cast<uint32_t>(i / 8) * stride + static_cast<uint32_t>(i % 8 * 128 + k * 2);
}
inline uint32_t turned_place(uint64_t operand, int i, int k) {
  const auto start = static_cast<uint32_t>(operand & 0x3fff) << 4,
             stride = static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4,
             leading = static_cast<uint32_t>(operand >> 16 & 0x3fff) << 4;
  return start + static_cast<uint32_t>(i / 64) * leading + static_cast<uint32_t>(k / 8) * stride +
         static_cast<uint32_t>(k % 8 * 128 + i % 64 * 2);
}

inline void multiply(const float (&a)[16][16], const float (&b)[16][128], float (&out)[16][128]) {
  for (int row = 0; row < 16; ++row) {
    float sum[128] = {};
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 128; ++column) sum[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 128; ++column) out[row][column] = sum[column];
  }
}

struct Shared {
  uint64_t a, b;
};
struct Registers {
  uint32_t a[4];
  uint64_t b;
};

/// A warp's 16 rows of its warpgroup's 64.
template <class Element>
void multiply_shared(emulator::Meeting& meeting) {
  const Shared mine = meeting.of<Shared>(0);
  const int first = static_cast<int>(threadIdx.x / 32 % 4) * 16;
  float a[16][16], b[16][128];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) a[row][k] = element_at<Element>(place(mine.a, first + row, k));
    for (int column = 0; column < 128; ++column) b[k][column] = element_at<Element>(place(mine.b, column, k));
  }
  multiply(a, b, meeting.product);
}
template <class Element>
void multiply_registers(emulator::Meeting& meeting) {
  float a[16][16], b[16][128];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {
      const auto word = static_cast<std::uint16_t>(meeting.of<Registers>(lane).a[i / 2] >> i % 2 * 16);
      a[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + 2 * (lane % 4) + i % 2] =
          std::is_same_v<Element, __half> ? emulator::as_half(word) : emulator::as_bfloat16(word);
    }
  const uint64_t operand = meeting.of<Registers>(0).b;
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < 128; ++column) b[k][column] = element_at<Element>(turned_place(operand, column, k));
  multiply(a, b, meeting.product);
}

inline void take(Accumulators& d, const emulator::Meeting& meeting, bool keep) {
  const int lane = emulator::here->lane;
  for (int n = 0; n < 16; ++n)
    for (int e = 0; e < 4; ++e) {
      const float product = meeting.product[lane / 4 + e / 2 * 8][8 * n + 2 * (lane % 4) + e % 2];
      d[n][e] = keep ? d[n][e] + product : product;
    }
}

}  // namespace emulated

template <class Element>
void product(Accumulators& d, uint64_t a, uint64_t b, int keep) {
  emulated::take(d, emulator::meet_warp("wgmma", emulated::Shared{a, b}, emulated::multiply_shared<Element>),
                 keep != 0);
}
template <class Element>
void product(Accumulators& d, const uint32_t (&a)[4], uint64_t b) {
  emulated::take(d,
                 emulator::meet_warp("wgmma", emulated::Registers{{a[0], a[1], a[2], a[3]}, b},
                                     emulated::multiply_registers<Element>),
                 true);
}

}  // namespace kv::blocks
