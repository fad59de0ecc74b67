// What a batch measured, from device memory into results.
#include <fmt/core.h>

#include <algorithm>

#include "kernels/batch.hpp"

namespace kv {
namespace {

/// The exception that a unit's error is.
std::exception_ptr error_of(const Progress& p, const Unit& unit, const TraceHeader& header, const std::string& policy) {
  const HeadInfo& head = unit.info;
  switch (p.error) {
    case UnitError::none:
      return nullptr;
    case UnitError::nan_score:
      return std::make_exception_ptr(
          InternalError(fmt::format("policy {} scored NaN: layer {}, KV head {}, slot {} (token {})", policy,
                                    head.layer, head.kv_head, p.error_at[0], p.error_at[1])));
    case UnitError::bad_plan:
      return std::make_exception_ptr(
          InternalError(fmt::format("policy {} planned a merge that cannot be: layer {}, KV head {}, victim {} into "
                                    "slot {} of {}, weights key {} and "
                                    "{}, value {} and {}",
                                    policy, head.layer, head.kv_head, p.error_at[0], p.error_at[1], p.error_at[2],
                                    p.error_weights[0], p.error_weights[1], p.error_weights[2], p.error_weights[3])));
    case UnitError::bad_divisor:
      return std::make_exception_ptr(InternalError(
          fmt::format("policy {} merges with a divisor that is 0 or not finite: layer {}, KV head {}, slot {}", policy,
                      head.layer, head.kv_head, p.error_at[0])));
    case UnitError::not_finite:
      break;
  }
  return std::make_exception_ptr(TraceError(
      fmt::format("{}: the attention output of layer {}, query head {}, token {} is not finite: logits overflow, or a "
                  "policy's merged keys do",
                  header.file.string(), head.layer, p.error_at[0], p.error_at[1])));
}

}  // namespace

void Batch::finish() {
  const TraceData& t = trace_.data;
  const int count = static_cast<int>(units_.size()), rows = static_cast<int>(plan_.settings.measured.size());
  program_->launch(stage(Stage::finish, plan_.blocks.back()), t.kv_heads, row_bytes_, stream_);
  if (plan_.settings.positions != Positions::absolute || plan_.merges) {
    fill_lost_tasks(span(), measured_.data(), rows, lost_masses_.data(), lost_tasks_.data(), stream_);
    lost_masses(trace_.shape(), lost_tasks_.data(), {count, rows, t.tokens}, stream_);
    store_lost_masses(span(), lost_masses_.data(), rows, stream_);
  }
  if (!plan_.has_wo) return;
  const auto layers = layers_.size(), points = points_.size(), measured = static_cast<std::size_t>(rows);
  if (wo_error2_.size() == 0) {
    wo_error2_ = Buffer<double>(points * layers * measured), wo_output2_ = Buffer<double>(layers * measured);
  }
  KV_CUDA_TRY(cudaMemsetAsync(wo_error2_.data(), 0xff, wo_error2_.size() * sizeof(double), stream_));
  KV_CUDA_TRY(cudaMemsetAsync(wo_output2_.data(), 0xff, wo_output2_.size() * sizeof(double), stream_));
  const int width = t.group * t.value_dim;
  const std::size_t layer_floats = measured * static_cast<std::size_t>(t.kv_heads * width);
  for (std::size_t l = 0; l < layers; ++l) {
    const float* wo = layers_[l].wo;
    if (!wo) continue;
    const int hidden = header_.model.hidden_size;
    squared_after_wo(wo, layers_[l].data.full_output, hidden, t.kv_heads, rows, width,
                     wo_output2_.data() + l * measured, stream_);
    for (std::size_t p = 0; p < points; ++p)
      squared_after_wo(wo, delta_.data() + (p * layers + l) * layer_floats, hidden, t.kv_heads, rows, width,
                       wo_error2_.data() + (p * layers + l) * measured, stream_);
  }
}

void Batch::collect(std::vector<ReplayResult>& results, std::vector<std::exception_ptr>& errors, cudaStream_t stream) {
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  KV_CUDA_TRY(cudaCtxResetPersistingL2Cache());  // lines that were asked to stay would outlive their kernel
  const std::vector<Progress> progress = progress_.to_host();
  const std::vector<double> measures = measures_.to_host();
  const std::vector<int> slots = slots_.to_host();
  const auto heads = static_cast<std::size_t>(trace_.data.kv_heads), layers = layers_.size(), count = units_.size(),
             per_unit = plan_.settings.measured.size() * static_cast<std::size_t>(trace_.data.group),
             steps = plan_.blocks.size(), measured = plan_.settings.measured.size();
  std::vector<int> offsets(count);
  int total = 0;
  for (std::size_t u = 0; u < count; ++u) offsets[u] = total, total += progress[u].size;
  const Buffer<int> device_offsets(offsets), position(static_cast<std::size_t>(total)),
      multiplicity(static_cast<std::size_t>(total));
  gather_final(span(), device_offsets.data(), position.data(), multiplicity.data(), stream);
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  const std::vector<int> positions = position.to_host(), multiplicities = multiplicity.to_host();
  std::vector<double> wo_error2, wo_output2;
  if (plan_.has_wo) wo_error2 = wo_error2_.to_host(), wo_output2 = wo_output2_.to_host();
  const std::size_t bytes = bytes_of_unit(trace_.data, plan_, *program_);
  for (std::size_t p = 0; p < points_.size(); ++p) {
    ReplayResult& r = results[p];
    for (std::size_t i = 0; i < layers * heads; ++i) {
      const std::size_t u = p * layers * heads + i, at = static_cast<std::size_t>(first_layer_) * heads + i;
      const Progress& unit = progress[u];
      if (!errors[p]) errors[p] = error_of(unit, units_[u], header_, points_[p].entry->doc.name);
      std::vector<double>* metrics[] = {&r.error2, &r.output2, &r.cosine, &r.lost_mass, &r.mass_tv};
      for (std::size_t m = 0; m < 5; ++m)
        if (!metrics[m]->empty())
          std::copy_n(measures.data() + (m * count + u) * per_unit, per_unit, metrics[m]->data() + at * per_unit);
      std::copy_n(slots.data() + u * steps, steps, r.slots.data() + at * steps);
      r.final_slots[at] = unit.size;
      r.final_position[at].assign(positions.begin() + offsets[u], positions.begin() + offsets[u] + unit.size);
      r.final_multiplicity[at].assign(multiplicities.begin() + offsets[u],
                                      multiplicities.begin() + offsets[u] + unit.size);
      r.evictions += unit.evictions, r.merges += unit.merges, r.compressions += unit.compressions;
      r.lost_in_folds += unit.lost_in_folds, r.lost_by_clip += unit.lost_by_clip;
      r.weights_outside += unit.weights_outside, r.unbalanced += unit.unbalanced;
      if (unit.notes > 0) {
        std::vector<float> notes(static_cast<std::size_t>(std::min(unit.notes, trace_.data.tokens)));
        KV_CUDA_TRY(cudaMemcpy(notes.data(), units_[u].notes, notes.size() * sizeof(float), cudaMemcpyDeviceToHost));
        std::sort(notes.begin(), notes.end());  // threads took their places in any order
        r.fold_notes.insert(r.fold_notes.end(), notes.begin(), notes.end());
      }
    }
    r.workspace_bytes = std::max(r.workspace_bytes, bytes);
    for (std::size_t l = 0; l < layers && plan_.has_wo; ++l) {
      const std::size_t to = (static_cast<std::size_t>(first_layer_) + l) * measured;
      std::copy_n(wo_error2.data() + (p * layers + l) * measured, measured, r.wo_error2.data() + to);
      std::copy_n(wo_output2.data() + l * measured, measured, r.wo_output2.data() + to);
    }
  }
}

double Batch::steps_us(cudaStream_t stream) const {
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  double us = 0;
  for (const auto& timer : step_timers_) us += timer->microseconds();
  return us;
}

double Batch::prompt_us(cudaStream_t stream) const {
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  double us = 0;
  for (const auto& timer : prompt_timers_) us += timer->microseconds();
  return us;
}

BatchTimes Batch::times(cudaStream_t stream) {
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  BatchTimes times;
  for (const auto& timer : prompt_timers_)
    times.prompt_us[static_cast<std::size_t>(timer->phase)] += timer->microseconds();
  // A launch plays all heads at once: its time is shared out by the clocks that they spent in each phase of each step.
  const double steps = this->steps_us(stream);
  double all = 0;
  const std::vector<unsigned> clocks = clocks_.to_host();
  const std::size_t count = plan_.blocks.size();
  std::vector<std::vector<double>> spent(timed_phases, std::vector<double>(count));
  for (std::size_t i = 0; i < clocks.size(); ++i) {
    spent[i % timed_phases][i / timed_phases % count] += clocks[i];
    all += clocks[i];
  }
  for (std::size_t phase = 0; phase < timed_phases; ++phase) {
    times.step_us.emplace_back();
    for (std::size_t step = 0; step < count; ++step) {
      const double us = all > 0 ? spent[phase][step] / all * steps : 0;
      if (plan_.blocks[step].phase == Phase::decode)
        times.step_us.back().push_back(us);
      else
        times.prompt_us[phase] += us;
    }
  }
  return times;
}

}  // namespace kv
