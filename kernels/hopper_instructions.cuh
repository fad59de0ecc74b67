// Hopper's own instructions (sm_90a): warpgroup products on swizzled shared memory, and the hand-over of registers. kernels/emulator has the same functions
// for a machine without a GPU.
#pragma once
#include <type_traits>

#include "kernels/instructions.cuh"

namespace kv::blocks {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KV_HOPPER 1
#endif

/// The thread's copies have landed and products may read them, once a barrier has been passed.
__device__ inline void publish_copies() {
  asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
}

/// Starts copying four times 16 bytes, which lie 512 apart, `step` times 1024 bytes from where the addresses point and
/// 2048 from where they are: constants, as copies hold on to the registers of their addresses for a while.
template <int step>
__device__ inline void copy_four(const uint32_t (&to)[4], const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0 + %5], [%4 + %6], 16;\n"
      "cp.async.cg.shared.global [%1 + %5], [%4 + %7], 16;\n"
      "cp.async.cg.shared.global [%2 + %5], [%4 + %8], 16;\n"
      "cp.async.cg.shared.global [%3 + %5], [%4 + %9], 16;" ::"r"(to[0]),
      "r"(to[1]), "r"(to[2]), "r"(to[3]), "l"(from), "n"(step * 1024), "n"(step * 2048), "n"(step * 2048 + 512),
      "n"(step * 2048 + 1024), "n"(step * 2048 + 1536)
      : "memory");
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
/// The operand that lies some bytes further on.
__device__ inline uint64_t further(uint64_t operand, int bytes) { return operand + static_cast<uint64_t>(bytes >> 4); }

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

/// The work on two sums stays before the next wait.
__device__ inline void pin(float (&sum)[2]) { asm volatile("" : "+f"(sum[0]), "+f"(sum[1])::"memory"); }
#endif

}  // namespace kv::blocks
