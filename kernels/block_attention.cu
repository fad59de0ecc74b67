#include "kernels/block_attention.hpp"

#include <algorithm>

#include "kernels/attention_launch.cuh"
#include "kernels/column_sums.cuh"
#include "kernels/gradient_tiles.cuh"
#include "kernels/hopper_rows.cuh"
#include "kernels/key_gradients.cuh"
#include "kernels/plain_attention.cuh"
#include "kernels/row_attention.cuh"

namespace kv {

using namespace blocks;

namespace {

/// Any shape, by tensor cores where they take it.
template <class Task>
void general_rows(const AttentionShape& shape, const Task* tasks, const AttentionBounds& bounds, cudaStream_t stream) {
  const LogitRule rule = logit_rule(shape);
  const int pairs = bounds.rows * shape.group;
  constexpr bool lost = std::is_same_v<Task, LostMassTask>;
  if (!fits_tensor_cores(shape, shape.key_dim) || (!lost && !fits_tensor_cores(shape, shape.value_dim))) {
    const int ranks = tiles_of(pairs, plain_tile);
    const auto parts = lost ? 1u : static_cast<unsigned>(tiles_of(shape.value_dim, plain_dims));
    return launch(plain_row_kernel<Task>, dim3(work_blocks(bounds.tasks, ranks), parts), plain_threads,
                  plain_row_floats(shape.value_dim) * 4, stream, shape, rule, tasks, bounds.tasks, ranks);
  }
  const int ranks = tiles_of(pairs, row_tile);
  const auto launch_rows = [&](auto fast) {
    with_tensor_shape(shape, lost ? shape.key_dim : std::max(shape.key_dim, shape.value_dim),
                      [&](auto element, auto dim) {
                        launch(row_kernel<decltype(element), dim, Task, fast>, work_blocks(bounds.tasks, ranks),
                               row_threads, RowLayout<dim>::bytes, stream, shape, rule, tasks, bounds.tasks, ranks);
                      });
  };
  if constexpr (!lost)
    if (shape.fast) return launch_rows(std::true_type{});
  launch_rows(std::false_type{});
}

/// The tasks with an output (`valued`) or those without.
template <bool valued, bool fast>
void hopper_rows(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                 cudaStream_t stream) {
  using Layout = HopperRows<valued>;
  const int ranks = tiles_of(bounds.rows * shape.group, Layout::pairs);
  with_element(shape, [&](auto element) {
    const auto kernel = hopper_row_kernel<decltype(element), valued, fast>;
    const auto blocks = static_cast<unsigned>(resident_blocks(kernel, Layout::threads, Layout::bytes));
    launch(kernel, std::min(blocks, work_blocks(bounds.tasks, ranks)), Layout::threads, Layout::bytes, stream, shape,
           logit_rule(shape), tasks, bounds.tasks, ranks);
  });
}

bool hopper_takes(const AttentionShape& shape, const AttentionBounds& bounds) {
  return shape.elements != Dtype::float32 && shape.key_dim == hopper_dim && shape.value_dim == hopper_dim &&
         shape.softcap <= 0 && bounds.rows * shape.group >= HopperRows<true>::pairs &&
         is_built(hopper_row_kernel<__nv_bfloat16, true, false>);
}

}  // namespace

void block_attention(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                     cudaStream_t stream) {
  if (bounds.tasks == 0 || bounds.rows == 0) return;
  if (!hopper_takes(shape, bounds)) return general_rows(shape, tasks, bounds, stream);
  if (bounds.with_output && shape.fast)
    hopper_rows<true, true>(shape, tasks, bounds, stream);
  else if (bounds.with_output)
    hopper_rows<true, false>(shape, tasks, bounds, stream);
  if (bounds.without_output) hopper_rows<false, false>(shape, tasks, bounds, stream);
}

void column_masses(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                   cudaStream_t stream) {
  column_sums<WeighProbability>(shape, tasks, bounds, stream);
}

void lost_masses(const AttentionShape& shape, const LostMassTask* tasks, const AttentionBounds& bounds,
                 cudaStream_t stream) {
  if (bounds.tasks == 0 || bounds.rows == 0) return;
  general_rows(shape, tasks, bounds, stream);
}

static_assert(gradient_tile == plain_tile);

void key_gradients(const AttentionShape& shape, const KeyGradientTask* tasks, const AttentionBounds& bounds,
                   cudaStream_t stream) {
  if (bounds.tasks == 0 || bounds.slots == 0) return;
  const int ranks = tiles_of(bounds.slots, gradient_tile);
  const int widest = std::max(shape.key_dim, shape.value_dim);
  if (shape.elements == Dtype::bfloat16 && fits_tensor_cores(shape, shape.key_dim) &&
      fits_tensor_cores(shape, shape.value_dim) && (widest <= 128 || has_shared(GradientLayout<256>::bytes)))
    return with_padded_dim(widest, [&](auto dim) {
      launch(gradient_tile_kernel<dim>, work_blocks(bounds.tasks, ranks), gradient_threads, GradientLayout<dim>::bytes,
             stream, shape, logit_rule(shape), tasks, bounds.tasks, ranks);
    });
  const auto parts = static_cast<unsigned>(tiles_of(shape.key_dim, plain_dims));
  launch(gradient_kernel, dim3(work_blocks(bounds.tasks, ranks), parts), plain_threads,
         gradient_floats(shape.key_dim) * 4, stream, shape, logit_rule(shape), tasks, bounds.tasks, ranks);
}

}  // namespace kv
