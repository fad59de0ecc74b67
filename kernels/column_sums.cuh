// Sums over query rows of any function of a probability, per slot and head.
#pragma once
#include <algorithm>

#include "kernels/attention_launch.cuh"
#include "kernels/column_tiles.cuh"
#include "kernels/hopper_columns.cuh"
#include "kernels/plain_attention.cuh"

namespace kv {

/// What column_masses sums. Any struct with such a function does: `logit` is after the softcap and without bias, the
/// row is the rows_after-th before the last one. It may be called for pairs that are not visible; those do not count.
/// `in_proportion`, if it is there: twice the probability weighs twice as much.
struct WeighProbability {
  static constexpr bool in_proportion = true;
  static __device__ float weigh(float probability, float, int) { return probability; }
};

/// sums[slot][head] = sum over the rows that see the slot of Weigh::weigh(probability, logit, rows_after), with the
/// probabilities that the tasks' `lse` give. Every sum has one owner and a fixed order. Throws CudaError.
template <class Weigh>
void column_sums(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                 cudaStream_t stream) {
  using namespace blocks;
  if (bounds.tasks == 0 || bounds.slots == 0) return;
  const LogitRule rule = logit_rule(shape);
  if (!fits_tensor_cores(shape, shape.key_dim)) {
    const int ranks = tiles_of(bounds.slots, plain_tile) * shape.group;
    return launch(plain_column_kernel<Weigh>, work_blocks(bounds.tasks, ranks), plain_threads, plain_tile_floats * 4,
                  stream, shape, rule, tasks, bounds.tasks, ranks);
  }
  // A Hopper tile has 128 rows of a head or 64 of two: with few, most of it would be zeros.
  if (shape.elements != Dtype::float32 && shape.key_dim == hopper_dim && !rule.capped && bounds.rows > 48 &&
      is_built(hopper_column_kernel<Weigh, __nv_bfloat16>)) {
    const HopperColumnWork work(shape, bounds);
    return with_element(shape, [&](auto element) {
      const auto kernel = hopper_column_kernel<Weigh, decltype(element)>;
      const int blocks = resident_blocks(kernel, HopperColumns::threads, HopperColumns::bytes);
      launch(kernel, static_cast<unsigned>(std::min(blocks, work.pieces())), HopperColumns::threads,
             HopperColumns::bytes, stream, shape, rule, tasks, work);
    });
  }
  with_tensor_shape(shape, shape.key_dim, [&](auto element, auto dim) {
    const ColumnPlan plan = column_plan<dim>(shape, bounds, multiprocessors());
    const int ranks = tiles_of(bounds.slots, plan.slot_tiles * column_tile) * tiles_of(shape.group, plan.heads);
    launch(column_kernel<Weigh, decltype(element), dim>, work_blocks(bounds.tasks, ranks), column_threads,
           ColumnLayout<dim>(plan).bytes, stream, shape, rule, tasks, bounds.tasks, ranks, plan);
  });
}

}  // namespace kv
