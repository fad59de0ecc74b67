// Hopper's own instructions (sm_90a): warpgroup products on swizzled shared memory, transaction-free mbarriers between a
// warp that copies and the warpgroups that compute, and the hand-over of registers. Tiles have 128 elements a row, in two
// halves of 64: a half is rows of 128 bytes whose 16-byte chunks are exchanged within every 8 rows ("128-byte swizzle").
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KV_HOPPER 1
#endif

constexpr int hopper_dim = 128, hopper_tile = 128;               // elements a row, rows of a streamed tile
constexpr int half_64 = 64 * 128, half_128 = 128 * 128;          // bytes of a half of 64 or 128 rows
constexpr int bytes_64 = 2 * half_64, bytes_128 = 2 * half_128;  // bytes of a tile
constexpr int swizzle_bytes = 1024;                              // alignment of tiles

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// One arrival a warp, after the whole warp's last read: a single one a warpgroup would let the copies overtake its
/// slower warps.
__device__ inline void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

/// The thread's copies have landed and products may read them, once a barrier has been passed.
__device__ inline void publish_copies() {
  asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
}

/// Named barriers. `threads` counts those who wait and those who only arrive.
__device__ inline void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Byte offset of a chunk (of 16) of a row in a tile whose halves are `half_bytes` apart.
__device__ inline uint32_t half_offset(int row, int chunk, int half_bytes) {
  return static_cast<uint32_t>(chunk / 8 * half_bytes + row * 128 + (((chunk % 8) ^ (row & 7)) << 4));
}

/// A warpgroup starts copying 64 rows of its own; null rows are zeros.
template <class RowAt>
__device__ void copy_own_rows(uint32_t tile, const void* any, RowAt row_at) {
  const int thread = static_cast<int>(threadIdx.x % 128), chunk = thread % 16;
#pragma unroll
  for (int row = thread / 16; row < 64; row += 8) {
    const char* const from = static_cast<const char*>(row_at(row));
    copy_16(tile + half_offset(row, chunk, half_64), from ? from + chunk * 16 : any, from != nullptr);
  }
}

/// A warp starts copying 128 rows that follow one another; rows from `count` on are zeros.
__device__ inline void copy_tile(uint32_t tile, const void* rows, int count) {
  const int lane = static_cast<int>(threadIdx.x % 32), odd = lane / 16, chunk = lane % 16;
  const char* from = static_cast<const char*>(rows) + odd * 256 + chunk * 16;
  uint32_t to[4];  // two rows a step: the exchange repeats after four
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = tile + half_offset(2 * i + odd, chunk, half_128);
  if (count >= 128) {
#pragma unroll 1
    for (int i = 0; i < 16; ++i, from += 2048)  // offsets are constants: 64 addresses would not fit the registers
      asm volatile(
          "cp.async.cg.shared.global [%0], [%4], 16;\n"
          "cp.async.cg.shared.global [%1], [%4 + 512], 16;\n"
          "cp.async.cg.shared.global [%2], [%4 + 1024], 16;\n"
          "cp.async.cg.shared.global [%3], [%4 + 1536], 16;" ::"r"(to[0] + i * 1024),
          "r"(to[1] + i * 1024), "r"(to[2] + i * 1024), "r"(to[3] + i * 1024), "l"(from)
          : "memory");
  } else {
#pragma unroll 1
    for (int i = 0; i < 64; ++i) {
      const bool real = 2 * i + odd < count;
      const uint32_t step_to = tile + half_offset(2 * i + odd, chunk, half_128);
      copy_16(step_to, real ? from + i * 512 : rows, real);
    }
  }
}

/// A warp starts copying 128 rows of 256 bytes; lane l knows the indices of rows l, l + 32, l + 64, l + 96, -1 for zeros.
__device__ inline void copy_rows(uint32_t tile, const void* rows, const int (&index)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), odd = lane / 16, chunk = lane % 16;
  const int first = __shfl_sync(~0u, index[0], 0);
  bool in_order = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) in_order = in_order && index[i] == first + 32 * i + lane;
  if (__all_sync(~0u, in_order)) return copy_tile(tile, static_cast<const char*>(rows) + long{first} * 256, 128);
#pragma unroll
  for (int part = 0; part < 4; ++part)
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
      const int at = __shfl_sync(~0u, index[part], 2 * i + odd);
      const char* const from = static_cast<const char*>(rows) + (at < 0 ? 0 : long{at} * 256 + chunk * 16);
      copy_16(tile + half_offset(32 * part + 2 * i + odd, chunk, half_128), from, at >= 0);
    }
}

#ifdef KV_HOPPER
template <int count>
__device__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// A warpgroup's accumulators of 64 x 128, as a dot_tile's: lane l of warp w has rows 16w + l/4 and 8 more.
using Accumulators = float[16][4];

/// Ties registers to this point of the program: products write them behind the compiler's back.
__device__ inline void pin(Accumulators& d) {
#pragma unroll
  for (int n = 0; n < 16; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
}

/// What the hardware wants to know of an operand; offsets between its 8-row groups and, for V, between halves.
__device__ inline uint64_t operand(uint32_t address, int leading, int stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

#define KV_ACC_NAMES                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63}"
#define KV_ACC_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define KV_ACC_16(i) KV_ACC_4(i), KV_ACC_4(i + 1), KV_ACC_4(i + 2), KV_ACC_4(i + 3)
#define KV_ACC KV_ACC_16(0), KV_ACC_16(4), KV_ACC_16(8), KV_ACC_16(12)

// d = keep * d + A B^T, both in shared memory
#define KV_PRODUCT_SHARED(type)                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               " " KV_ACC_NAMES ", %64, %65, p, 1, 1, 0, 0;\n}"                                              \
               : KV_ACC                                                                                      \
               : "l"(a), "l"(b), "r"(keep))
// d += A B, A in registers, B's rows along the product
#define KV_PRODUCT_REGISTERS(type)                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type " " KV_ACC_NAMES \
               ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"                              \
               : KV_ACC                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class Element>
__device__ void product(Accumulators& d, uint64_t a, uint64_t b, int keep) {
  if constexpr (std::is_same_v<Element, __half>)
    KV_PRODUCT_SHARED("f16.f16");
  else
    KV_PRODUCT_SHARED("bf16.bf16");
}
template <class Element>
__device__ void product(Accumulators& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<Element, __half>)
    KV_PRODUCT_REGISTERS("f16.f16");
  else
    KV_PRODUCT_REGISTERS("bf16.bf16");
}

/// Starts d = A B^T for a tile of 64 rows and one of 128.
template <class Element>
__device__ __forceinline__ void start_dots(Accumulators& d, uint32_t a, uint32_t b) {
  pin(d);
  products_begin();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    product<Element>(d, operand(a + k / 4 * half_64 + k % 4 * 32, 16, 1024),
                     operand(b + k / 4 * half_128 + k % 4 * 32, 16, 1024), k > 0);
  products_end();
}

/// Probabilities of 64 x 128 as operands, both words of each, or, `fast`, each rounded to one.
template <bool fast>
struct SplitTile {
  uint32_t high[8][4], low[fast ? 1 : 8][4];

  template <class Element>
  __device__ __forceinline__ void split(const Accumulators& p) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if constexpr (fast)
          high[k][i] = Words<Element>::pack(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
        else
          Words<Element>::split(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1], high[k][i], low[k][i]);
  }
};

/// Starts o += P V for a tile of 128 slots.
template <class Element, bool fast>
__device__ __forceinline__ void start_values(Accumulators& o, const SplitTile<fast>& p, uint32_t v) {
  pin(o);
  products_begin();
#pragma unroll
  for (int k = 0; k < 8; ++k) product<Element>(o, p.high[k], operand(v + k * 2048, half_128, 1024));
#pragma unroll
  for (int k = 0; !fast && k < 8; ++k) product<Element>(o, p.low[k], operand(v + k * 2048, half_128, 1024));
  products_end();
}
#endif

}  // namespace kv::blocks
