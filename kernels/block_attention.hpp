// Attention of many query rows over a cache, on tensor cores where the elements allow: prompt blocks, probes, windows of
// queries and the full attention that everything is compared with. All launches are asynchronous on `stream` and
// deterministic: equal inputs give equal bits. Nothing here knows a policy.
#pragma once
#include <cuda_runtime.h>

#include "kernels/attention_task.hpp"

namespace kv {

/// What is known of the tasks of a launch, which live in device memory: upper bounds that size the grid, and whether there are
/// such with an output and such without.
struct AttentionBounds {
  int tasks = 0, rows = 0, slots = 0;
  bool with_output = true, without_output = true;
};

/// Fills every task's `lse` (natural log of the softmax denominator, bias and sinks included), and `output` where it is
/// not null. 16-bit elements: probabilities enter the value product as two 16-bit words, relative error about 1e-5
/// against float64; `fast`: as one, about 1e-3 (bfloat16) or 2e-4 (float16), with the same `lse`. float32 elements, and
/// dims that are not multiples of 8 or above 256: all in float32, fast or not, much slower.
/// Tasks with 0 rows or 0 slots are allowed. A row that sees a sink only has output 0 and the sink as log-sum-exp.
/// Throws CudaError.
void block_attention(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                     cudaStream_t stream);

/// sums[slot][head] = sum over rows of the slot's probability, from the tasks' `lse`. Throws CudaError. Other statistics
/// are in column_sums.cuh.
void column_masses(const AttentionShape& shape, const AttentionTask* tasks, const AttentionBounds& bounds,
                   cudaStream_t stream);

/// For every row and head of every task: the sum of probabilities, from the tasks' `lse`, of the slots s that are visible
/// and have lost_at[s] < query_token[row]: the attention mass of tokens that nothing stands for any more. `lost_at` and
/// `masses` ([rows][group]) are one per task.
struct LostMassTask {
  AttentionTask attention;
  const int* lost_at = nullptr;  // [slots] newest token of the step that lost it; 0x7fffffff = still there
  double* masses = nullptr;
};
void lost_masses(const AttentionShape& shape, const LostMassTask* tasks, const AttentionBounds& bounds,
                 cudaStream_t stream);

/// gradients[slot][key_dim] = sum over rows and heads of scale * p * (e . (v - o)) * slope(softcap) * q, the derivative of
/// a loss with output gradients e by each (rotated) key; o is the task's `output` (not null), p comes from its `lse`
/// (kvslimmer-asymkv 2.4). bfloat16 elements: e and the slopes enter as two words, relative error about 1e-5. `e` is [group][e_stride][value_dim] in float32, row query_row[r]; null: e = o.
struct KeyGradientTask {
  AttentionTask attention;
  const float* e = nullptr;
  float* gradients = nullptr;
  long e_stride = 0;  // rows between the heads of e
};
void key_gradients(const AttentionShape& shape, const KeyGradientTask* tasks, const AttentionBounds& bounds,
                   cudaStream_t stream);

}  // namespace kv
