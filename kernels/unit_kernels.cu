#include "kernels/unit_kernels.hpp"

#include <algorithm>

#include "kernels/comparison.cuh"
#include "kernels/launch.cuh"
#include "kernels/rotation.cuh"

namespace kv {
namespace {

__global__ void widen_words_kernel(const void* words, Dtype from, float* to, long count) {
  for (long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<long>(gridDim.x) * blockDim.x)
    to[i] = load_element(words, from, i);
}

__global__ void rotate_rows_kernel(RowRotation r) {
  const auto at = [&](const void* rows, long row) {
    return const_cast<char*>(static_cast<const char*>(rows)) + row * r.shape.dim * bytes_of(r.shape.elements);
  };
  turn_rows(
      r.shape, r.rows, blockIdx.x, gridDim.x,
      [&](long row) {
        const long angles = static_cast<long>(r.token[row % r.count]) * r.shape.pairs;
        return TurnedRow{r.cos + angles, r.sin + angles, at(r.from, row), at(r.to, row)};
      },
      [](long) {});
}

/// Keys and queries of a look, turned to the places that the look has found.
__global__ void turn_look_kernel(const Unit* units, const LayerData* layers, TraceData trace,
                                 const AttentionTask* tasks) {
  const Unit& unit = units[blockIdx.x];
  const LayerData& layer = layers[unit.layer];
  const AttentionTask& task = tasks[blockIdx.x];
  if (task.rows == 0) return;
  const Rotation rotation = rotation_of(trace, layer);
  const int* key_place = unit.work[3];
  const auto turned = [&](int place, const void* in, long from, void* out, long to) {
    const long angles = static_cast<long>(place) * trace.pairs, bytes = trace.key_dim * bytes_of(trace.elements);
    return TurnedRow{layer.cos + angles, layer.sin + angles, static_cast<const char*>(in) + from * bytes,
                     static_cast<char*>(out) + to * bytes};
  };
  turn_rows(
      rotation, task.slots, blockIdx.y, gridDim.y,
      [&](long s) {
        const int place = key_place[s];
        return unit.rotated_at[s] == place ? TurnedRow{} : turned(place, unit.keys, s, unit.rotated, s);
      },
      [&](long s) { unit.rotated_at[s] = key_place[s]; });
  turn_rows(
      rotation, static_cast<long>(task.rows) * trace.group, blockIdx.y, gridDim.y,
      [&](long i) {
        const long r = i / trace.group, g = i % trace.group, head = unit.info.kv_head * trace.group + g;
        if (unit.query_place[r] < 0) return TurnedRow{};
        return turned(unit.query_place[r], layer.q, head * layer.query_rows + layer.row_of_token[task.query_token[r]],
                      unit.queries, g * task.rows + r);
      },
      [](long) {});
}

/// A warp a row, head by head.
__global__ void measure_look_kernel(const Unit* units, const LayerData* layers, Progress* progress, TraceData trace,
                                    const AttentionTask* tasks, const int* measured_of_token, int measured_count) {
  const Unit& unit = units[blockIdx.x];
  const AttentionTask& task = tasks[blockIdx.x];
  const int warps = static_cast<int>(blockDim.x / 32 * gridDim.y);
  for (int r = static_cast<int>((blockIdx.y * blockDim.x + threadIdx.x) / 32); r < task.rows; r += warps) {
    const int token = task.query_token[r], m = measured_of_token[token];
    if (m < 0) continue;
    for (int g = 0; g < trace.group; ++g) {
      const MeasuredHead head{g, m, measured_count, token};
      const long i = static_cast<long>(r) * trace.group + g;
      compare_outputs(unit, trace, progress[blockIdx.x], head, task.output + i * trace.value_dim,
                      full_output_of(unit, layers[unit.layer], trace, head), static_cast<double>(task.lse[i]));
    }
  }
}

/// The gradients of a probed block: its look, and whose gradients enter.
__global__ void fill_gradient_tasks_kernel(const Unit* units, const LayerData* layers, TraceData trace,
                                           const AttentionTask* tasks, int count, int first_token, bool absolute,
                                           bool recorded, KeyGradientTask* out) {
  const int u = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (u >= count) return;
  const LayerData& layer = layers[units[u].layer];
  KeyGradientTask task;
  task.attention = tasks[u], task.gradients = units[u].gradient, task.e_stride = layer.query_rows;
  // Rows of turned queries are numbered within the block, rows of recorded gradients within the layer.
  const long row = static_cast<long>(units[u].info.kv_head) * trace.group * layer.query_rows +
                   (absolute ? 0 : layer.row_of_token[first_token]);
  if (recorded) task.e = layer.e + row * trace.value_dim;
  out[u] = task;
}

/// Gradients by turned keys become those by unturned ones: the transposed rotation, a warp a slot.
__global__ void turn_gradients_back_kernel(const Unit* units, const LayerData* layers, const Progress* progress,
                                           TraceData trace) {
  const Unit& unit = units[blockIdx.x];
  const LayerData& layer = layers[unit.layer];
  const int warps = static_cast<int>(blockDim.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int second = trace.half_style ? trace.pairs : 1, stride = trace.half_style ? 1 : 2;
  for (int s = static_cast<int>(threadIdx.x / 32); s < progress[blockIdx.x].attended; s += warps) {
    float* row = unit.gradient + static_cast<long>(s) * trace.key_dim;
    const long place = unit.rotated_at[s];
    for (int i = lane; i < trace.pairs; i += 32) {
      const float cos = layer.cos[place * trace.pairs + i], sin = layer.sin[place * trace.pairs + i];
      const float x = row[i * stride], y = row[i * stride + second];
      row[i * stride] = x * cos + y * sin;
      row[i * stride + second] = y * cos - x * sin;
    }
  }
}

/// Which rows of full attention a unit has to give an account of: those of all its measured queries, if its own
/// log-sum-exps do not say what is missing.
__global__ void fill_lost_tasks_kernel(const Unit* units, const Progress* progress, const LayerData* layers,
                                       TraceData trace, const int* measured, int count, int rows, double* masses,
                                       LostMassTask* out) {
  const int u = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (u >= count) return;
  const Unit& unit = units[u];
  const LayerData& layer = layers[unit.layer];
  const long head = unit.info.kv_head, element = trace.elements == Dtype::float32 ? 4 : 2;
  LostMassTask task;
  AttentionTask& a = task.attention;
  a.keys = static_cast<const char*>(layer.k_rotated) + head * trace.tokens * trace.key_dim * element;
  a.values = layer.v, a.token = unit.every_token, a.slots = trace.tokens, a.window = layer.window;
  a.queries =
      static_cast<const char*>(layer.q_rotated) + head * trace.group * layer.query_rows * trace.key_dim * element;
  a.query_stride = layer.query_rows, a.query_token = measured;
  for (int r = 0; r < rows; ++r) unit.measured_row[r] = layer.row_of_token[measured[r]];
  a.query_row = unit.measured_row;
  a.sink_logit = layer.sink_logit ? layer.sink_logit + head * trace.group : nullptr;
  a.lse = const_cast<float*>(layer.full_lse) + head * rows * trace.group;
  a.rows = progress[u].lost ? rows : 0;
  task.lost_at = unit.lost_at, task.masses = masses + static_cast<long>(u) * rows * trace.group;
  out[u] = task;
}

__global__ void store_lost_masses_kernel(const Unit* units, const Progress* progress, const double* masses, int rows,
                                         int group) {
  const Unit& unit = units[blockIdx.x];
  if (!progress[blockIdx.x].lost) return;
  const double* mine = masses + static_cast<long>(blockIdx.x) * rows * group;
  for (int i = static_cast<int>(threadIdx.x); i < rows * group; i += static_cast<int>(blockDim.x))
    unit.lost_mass[static_cast<long>(i % group) * rows + i / group] = mine[i];
}

constexpr int wo_rows = 4, wo_warps = 8;  // rows and warps of a block
__global__ void squared_after_wo_kernel(const float* wo, const float* x, int hidden, int kv_heads, int rows,
                                        int group_width, double* out) {
  const int width = kv_heads * group_width, lane = static_cast<int>(threadIdx.x % 32);
  const int first = static_cast<int>(blockIdx.x) * wo_rows, here = min(wo_rows, rows - first);
  __shared__ double sums[wo_warps][wo_rows];
  double squares[wo_rows] = {};
  for (int h = static_cast<int>(threadIdx.x / 32); h < hidden; h += wo_warps) {
    float dot[wo_rows] = {};
    for (int c = lane; c < width; c += 32) {
      const float weight = wo[static_cast<long>(h) * width + c];
      const long head = c / group_width, channel = c % group_width;
      for (int r = 0; r < here; ++r)
        dot[r] = __fmaf_rn(weight, x[(head * rows + first + r) * group_width + channel], dot[r]);
    }
    for (int r = 0; r < wo_rows; ++r) {
      for (int k = 16; k > 0; k /= 2) dot[r] += __shfl_xor_sync(~0u, dot[r], k);
      squares[r] += static_cast<double>(dot[r]) * static_cast<double>(dot[r]);
    }
  }
  if (lane == 0)
    for (int r = 0; r < wo_rows; ++r) sums[threadIdx.x / 32][r] = squares[r];
  __syncthreads();
  if (threadIdx.x >= static_cast<unsigned>(here)) return;
  double sum = 0;
  for (int w = 0; w < wo_warps; ++w) sum += sums[w][threadIdx.x];
  out[first + static_cast<int>(threadIdx.x)] = sum;
}

/// Final caches one behind the other, by position.
__global__ void gather_final_kernel(const Unit* units, const Progress* progress, const int* offsets, int* position,
                                    int* multiplicity) {
  const Unit& unit = units[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < progress[blockIdx.x].size; i += static_cast<int>(blockDim.x)) {
    const int slot = unit.order[i];
    position[offsets[blockIdx.x] + i] = unit.token[slot];
    multiplicity[offsets[blockIdx.x] + i] = unit.multiplicity[slot];
  }
}

}  // namespace

void widen_words(const void* words, Dtype from, float* to, std::size_t count, cudaStream_t stream) {
  launch(widen_words_kernel, 512, 256, 0, stream, words, from, to, static_cast<long>(count));
}

void rotate_rows(const RowRotation& rotation, cudaStream_t stream) {
  launch(rotate_rows_kernel, 2048, 256, 0, stream, rotation);
}

namespace {

/// Blocks of threads beside each other for every unit, each with a few rounds of `rows` rows.
dim3 blocks_over(int units, long rows, int rows_a_round) {
  constexpr int rounds = 4;
  const long beside = (rows + rounds * rows_a_round - 1) / (rounds * rows_a_round);
  return {static_cast<unsigned>(units), static_cast<unsigned>(std::clamp(beside, 1l, 65535l))};
}

}  // namespace

void turn_look(const UnitSpan& s, const AttentionTask* looks, const AttentionBounds& bounds, cudaStream_t stream) {
  const long most = std::max<long>(bounds.slots, static_cast<long>(bounds.rows) * s.trace.group);
  launch(turn_look_kernel, blocks_over(s.count, most, 32), 256, 0, stream, s.units, s.layers, s.trace, looks);
}

void measure_look(const UnitSpan& s, const AttentionTask* looks, int rows, const int* measured_of_token, int measured,
                  cudaStream_t stream) {
  launch(measure_look_kernel, blocks_over(s.count, rows, 8), 256, 0, stream, s.units, s.layers, s.progress, s.trace,
         looks, measured_of_token, measured);
}

void fill_gradient_tasks(const UnitSpan& s, const AttentionTask* looks, int first_token, bool absolute, bool recorded,
                         KeyGradientTask* tasks, cudaStream_t stream) {
  launch(fill_gradient_tasks_kernel, (s.count + 127) / 128, 128, 0, stream, s.units, s.layers, s.trace, looks, s.count,
         first_token, absolute, recorded, tasks);
}

void turn_gradients_back(const UnitSpan& s, cudaStream_t stream) {
  launch(turn_gradients_back_kernel, s.count, 256, 0, stream, s.units, s.layers, s.progress, s.trace);
}

void fill_lost_tasks(const UnitSpan& s, const int* measured, int rows, double* masses, LostMassTask* tasks,
                     cudaStream_t stream) {
  launch(fill_lost_tasks_kernel, (s.count + 63) / 64, 64, 0, stream, s.units, s.progress, s.layers, s.trace, measured,
         s.count, rows, masses, tasks);
}

void store_lost_masses(const UnitSpan& s, const double* masses, int rows, cudaStream_t stream) {
  launch(store_lost_masses_kernel, s.count, 128, 0, stream, s.units, s.progress, masses, rows, s.trace.group);
}

void squared_after_wo(const float* wo, const float* x, int hidden, int kv_heads, int rows, int group_width, double* out,
                      cudaStream_t stream) {
  launch(squared_after_wo_kernel, (rows + wo_rows - 1) / wo_rows, wo_warps * 32, 0, stream, wo, x, hidden, kv_heads,
         rows, group_width, out);
}

void gather_final(const UnitSpan& s, const int* offsets, int* position, int* multiplicity, cudaStream_t stream) {
  launch(gather_final_kernel, s.count, 128, 0, stream, s.units, s.progress, offsets, position, multiplicity);
}

}  // namespace kv
