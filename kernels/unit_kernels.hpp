// Small kernels over layers and units that know no policy. All are asynchronous on `stream`; pointers are to device memory.
#pragma once
#include <cuda_runtime.h>

#include "kernels/block_attention.hpp"
#include "kernels/unit.hpp"

namespace kv {

/// Stored words of type `from` as floats. `words` may lie in pinned memory of the host.
void widen_words(const void* words, Dtype from, float* to, std::size_t count, cudaStream_t stream);

/// Rows of [heads][count][dim], each rotated to its token's own position: RopeTable::rotate, bit for bit.
struct RowRotation {
  const void* from = nullptr;
  void* to = nullptr;
  Rotation shape;
  long rows = 0;  // heads * count
  int count = 0;
  const int* token = nullptr;                  // [count]
  const float *cos = nullptr, *sin = nullptr;  // [tokens][pairs]
};
void rotate_rows(const RowRotation& rotation, cudaStream_t stream);

/// A batch of units as kernels see it.
struct UnitSpan {
  const Unit* units;
  Progress* progress;
  const LayerData* layers;
  TraceData trace;
  int count;
};

/// Rows that look at caches by their places: keys that are not there yet and all queries turn. `looks` are theirs.
void turn_look(const UnitSpan& span, const AttentionTask* looks, const AttentionBounds& bounds, cudaStream_t stream);

/// Outputs of the measured ones among a look's rows against full attention; the rest is Stage::finish's.
void measure_look(const UnitSpan& span, const AttentionTask* looks, int rows, const int* measured_of_token,
                  int measured, cudaStream_t stream);

/// The tasks of a probed block's key gradients: its look, and whose output gradients enter (`recorded`, or the outputs
/// themselves). `first_token` is the block's.
void fill_gradient_tasks(const UnitSpan& span, const AttentionTask* looks, int first_token, bool absolute,
                         bool recorded, KeyGradientTask* tasks, cudaStream_t stream);

/// Gradients by turned keys become those by unturned ones: the transposed rotation.
void turn_gradients_back(const UnitSpan& span, cudaStream_t stream);

/// The tasks of lost_masses for the measured queries, of units whose own log-sum-exps do not say what is missing (the
/// others get no rows); `masses` is [unit][rows][group].
void fill_lost_tasks(const UnitSpan& span, const int* measured, int rows, double* masses, LostMassTask* tasks,
                     cudaStream_t stream);

/// Those masses as the units' lost_mass.
void store_lost_masses(const UnitSpan& span, const double* masses, int rows, cudaStream_t stream);

/// out[row] = |W_o x|^2 of the rows of x [kv_heads][rows][group_width], wo [hidden][kv_heads * group_width].
void squared_after_wo(const float* wo, const float* x, int hidden, int kv_heads, int rows, int group_width, double* out,
                      cudaStream_t stream);

/// Final caches one behind the other by position: unit u's from offsets[u] on.
void gather_final(const UnitSpan& span, const int* offsets, int* position, int* multiplicity, cudaStream_t stream);

}  // namespace kv
