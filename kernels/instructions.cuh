// What C++ has no words for: tensor cores, asynchronous copies to shared memory, its addresses (sm_80 and later; what only
// Hopper has is in hopper.cuh). kernels/emulator has the same functions for a machine without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tile_map.hpp"

namespace kv {

/// 2^x with the special function unit: relative error 2^-22, results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2 of x with the special function unit: error 2^-22 of it, or of 1 where it is less.
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x with the special function unit: relative error 2^-23.
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two elements rounded to nearest, `low` in the lower half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline uint32_t pack_half(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// d += A B by a warp: A is 16 x 16, B 16 x 8. Lane l has rows l/4 and l/4 + 8 of A and d, column l/4 of B.
__device__ inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
/// The same object in shared memory, by an address that stays in a register: the compiler would make it again, from the
/// block's place in its cluster, wherever it is used.
template <class T>
__device__ T& by_kept_address(T& object) {
  uint32_t address = shared_address(&object);
  asm volatile("" : "+r"(address));
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

__device__ inline void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ inline void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ inline float4 load_shared(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

/// Adds 1 to a counter in shared memory, where `counts`. By a generic pointer it would be an atomic on memory of any kind, and lanes that
/// meet at one counter would take turns.
__device__ inline void count_one(uint32_t address, bool counts) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p red.shared.add.u32 [%0], 1;}" ::"r"(address),
               "r"(static_cast<unsigned>(counts))
               : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2(l%4)
/// and the next of row l/4 of each.
__device__ inline uint4 load_matrices(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
/// The same, transposed.
__device__ inline uint4 load_turned(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

/// An 8 x 8 matrix of 16-bit elements, of which lane l has elements 2(l%4) and the next of row l/4, transposed.
__device__ inline uint32_t turn_matrix(uint32_t x) {
  uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(x));
  return turned;
}

/// Starts copying 16 bytes to shared memory.
__device__ inline void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/// The same; all zero unless `real`.
__device__ inline void copy_16(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ inline void copy_4(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
/// The 128 bytes will be wanted soon: brings them to the second-level cache.
__device__ inline void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `pending` of the thread's last groups of copies are under way.
template <int pending>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Whether copy_box() is there (sm_90 and later).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool copies_boxes = true;
#else
constexpr bool copies_boxes = false;
#endif
/// What createpolicy.fractional.L2::evict_normal, ::evict_last and ::evict_first give for the whole of an access: wishes for how
/// long a line stays in the second-level cache.
constexpr uint64_t stay_as_usual = 0x1000000000000000, stay_long = 0x14F0000000000000, go_first = 0x12F0000000000000;
/// Starts copying a tile's rows of 64 channels, from one channel and row of a unit on, by one lane: 128 bytes a row, whose
/// chunks of 16 bytes are exchanged within every 8 rows; channels beyond a row's end are zeros. `barrier` counts the bytes.
__device__ inline void copy_box(uint32_t to, const TileMap* from, int channel, int row, int unit, uint32_t barrier,
                                uint64_t wish) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4}], [%5], %6;" ::"r"(to),
      "l"(from), "r"(channel), "r"(row), "r"(unit), "r"(barrier), "l"(wish)
      : "memory");
}
/// True in one lane of a whole warp.
__device__ inline bool is_elected() {
  unsigned elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}
/// What the thread has written by stores, copies of boxes may read or write over once a barrier has been passed.
__device__ inline void written_to_device(bool anything = true) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %0, 0; @p fence.proxy.async.global;}" ::"r"(static_cast<unsigned>(anything))
      : "memory");
}
__device__ inline void written_to_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Barriers in shared memory, whose phases end with so many arrivals and all bytes that were expected.
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void barrier_end(uint32_t barrier) { asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(barrier)); }
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(uint32_t barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline bool barrier_passed(uint32_t barrier, int parity) {
  unsigned passed;
  asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
  return passed != 0;
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

/// Arrives at such a barrier and waits until its phase ends.
__device__ inline void barrier_arrive_and_wait(uint32_t barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KV_WAIT "mbarrier.try_wait.shared.b64"
#else
#define KV_WAIT "mbarrier.test_wait.shared.b64"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      ".reg .b64 phase;\n"
      "mbarrier.arrive.shared.b64 phase, [%0];\n"
      "again: " KV_WAIT
      " done, [%0], phase;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier)
      : "memory");
#undef KV_WAIT
}

/// Named barriers. `threads` counts those who wait and those who only arrive.
__device__ inline void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Between blocks: what a block wrote before it adds, another sees that has read the sum; a barrier of the block on either side.
__device__ inline void add_release(int* to, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ inline int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

/// In a loop that waits for another block.
__device__ inline void wait_a_moment() {}

}  // namespace kv
