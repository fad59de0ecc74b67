// A batch through a trace: prompt blocks in stages with grid-wide attention between them, single tokens in one launch.
#include <algorithm>

#include "core/allocation.hpp"
#include "kernels/batch.hpp"
#include "kernels/row_memory.hpp"

namespace kv {

Batch::Timer::Timer(TimedPhase what, cudaStream_t stream) : phase(what) {
  KV_CUDA_TRY(cudaEventCreate(&begin));
  KV_CUDA_TRY(cudaEventCreate(&end));
  KV_CUDA_TRY(cudaEventRecord(begin, stream));
}
Batch::Timer::~Timer() { cudaEventDestroy(begin), cudaEventDestroy(end); }
void Batch::Timer::stop(cudaStream_t stream) { KV_CUDA_TRY(cudaEventRecord(end, stream)); }
double Batch::Timer::microseconds() const {
  float ms = 0;
  KV_CUDA_TRY(cudaEventElapsedTime(&ms, begin, end));
  return static_cast<double>(ms) * 1e3;
}

UnitSpan Batch::span() const {
  return {device_units_.data(), progress_.data(), device_layers_.data(), trace_.data, static_cast<int>(units_.size())};
}

namespace {

/// Launch::plain_width of the steps of a plan.
int plain_width(const TraceData& trace, const TraceHeader& header, const BatchPlan& plan) {
  const bool plain = trace.elements == Dtype::bfloat16 &&
                     streams(trace.elements, trace.key_dim, trace.value_dim, trace.group) && trace.softcap == 0 &&
                     std::ranges::none_of(header.layers, [](const LayerInfo& layer) { return layer.window > 0; }) &&
                     plan.settings.positions == Positions::absolute && !plan.settings.mass &&
                     !plan.traits.future_mass && plan.traits.future_queries.horizon == 0 &&
                     (!plan.traits.key_probe || probe_fits(trace.group));
  return plain ? stream_width(trace.key_dim, trace.value_dim) : 0;
}

}  // namespace

Launch Batch::stage(Stage what, const BlockRange& block) const {
  Launch launch;
  launch.maps = maps_.at(short_ring);
  launch.units = device_units_.data(), launch.progress = progress_.data(), launch.layers = device_layers_.data();
  launch.trace = trace_.data;
  launch.settings = {plan_.settings.positions, plan_.settings.compress,
                     plan_.settings.mass,      static_cast<int>(plan_.settings.measured.size()),
                     measured_.data(),         measured_of_token_.data()};
  launch.unit_count = static_cast<int>(units_.size());
  launch.stage = what, launch.phase = block.phase;
  launch.first = block.first, launch.last = block.last, launch.block = block.index;
  launch.probes = plan_.traits.key_probe;
  launch.tasks = tasks_.data(), launch.timed = timing_ == Timing::phases, launch.meeting = meeting_.data();
  return launch;
}

void Batch::play(const Launch& launch, TimedPhase phase) {
  if (timing_ != Timing::none) prompt_timers_.push_back(std::make_unique<Timer>(phase, stream_));
  program_->launch(launch, trace_.data.kv_heads, row_bytes_, stream_);
  if (timing_ != Timing::none) prompt_timers_.back()->stop(stream_);
}

const int* Batch::device_rows(const std::vector<int>& rows) {
  for (const auto& [list, buffer] : row_lists_)
    if (list == rows) return buffer.data();
  row_lists_.emplace_back(rows, Buffer<int>(rows));
  return row_lists_.back().second.data();
}

void Batch::look(Launch launch, const std::vector<int>& rows, bool outputs, bool sums, TimedPhase phase) {
  launch.stage = Stage::look, launch.rows = device_rows(rows), launch.row_count = static_cast<int>(rows.size());
  launch.outputs = outputs, launch.sums = sums;
  const Prefill& prefill = plan_.prefill;
  if (launch.block == 0 && launch.first_round && !outputs && launch.newest_key >= rows.back() &&
      prefill.first <= rows.front() && rows.back() < prefill.last)
    launch.prefill = prefill;
  play(launch, phase);
  const AttentionBounds bounds{launch.unit_count, launch.row_count,
                               slots_bound_ + (launch.probing ? launch.last - launch.first : 0), outputs, !outputs};
  AttentionShape shape = trace_.shape();
  shape.fast = plan_.settings.precision == Precision::fast && !launch.probing;  // a probe's outputs decide what goes
  if (launch.prefill.rows() == 0) {
    if (timing_ != Timing::none) prompt_timers_.push_back(std::make_unique<Timer>(phase, stream_));
    if (plan_.settings.positions != Positions::absolute) turn_look(span(), tasks_.data(), bounds, stream_);
    block_attention(shape, tasks_.data(), bounds, stream_);
    if (timing_ != Timing::none) prompt_timers_.back()->stop(stream_);
  }
  if (!sums) return;
  if (timing_ != Timing::none) prompt_timers_.push_back(std::make_unique<Timer>(TimedPhase::observe, stream_));
  if (program_->weighs(launch.window))
    program_->column_sums(shape, tasks_.data(), bounds.tasks, bounds.rows, bounds.slots, launch.window, stream_);
  else
    column_masses(shape, tasks_.data(), bounds, stream_);
  if (timing_ != Timing::none) prompt_timers_.back()->stop(stream_);
}

void Batch::probe(const BlockRange& block, bool first_round) {
  Launch launch = stage(Stage::look, block);
  launch.first_round = first_round, launch.probing = true;
  const bool wants_gradient = plan_.traits.key_gradient != KeyGradient::none;
  const std::vector<int> rows = tokens_between(block.first, block.last);
  look(launch, rows, wants_gradient, true, TimedPhase::observe);
  if (wants_gradient) gradients(launch, rows);
  launch.stage = Stage::probe, launch.row_count = static_cast<int>(rows.size());
  play(launch, TimedPhase::observe);
}

void Batch::gradients(const Launch& launch, const std::vector<int>& rows) {
  const int count = launch.unit_count;
  const bool absolute = plan_.settings.positions == Positions::absolute;
  fill_gradient_tasks(span(), tasks_.data(), launch.first, absolute, plan_.traits.key_gradient == KeyGradient::recorded,
                      gradient_tasks_.data(), stream_);
  key_gradients(trace_.shape(), gradient_tasks_.data(),
                {count, static_cast<int>(rows.size()), slots_bound_ + launch.last - launch.first}, stream_);
  if (absolute || trace_.data.pairs == 0) return;
  turn_gradients_back(span(), stream_);
}

void Batch::take(const BlockRange& block) {
  play(stage(Stage::append, block), TimedPhase::append);
  slots_bound_ += block.last - block.first;
  const auto& all = plan_.settings.measured;
  const std::vector<int> measured(std::lower_bound(all.begin(), all.end(), block.first),
                                  std::lower_bound(all.begin(), all.end(), block.last));
  const bool watches = block.phase == Phase::prompt ? plan_.traits.observes_prompt
                                                    : plan_.settings.compress == Compress::always || plan_.biases;
  const bool observes = plan_.observes && watches;
  if (measured.empty() && !observes) return;
  Launch launch = stage(Stage::look, block);
  const std::vector<int> rows = observes ? tokens_between(block.first, block.last) : measured;
  look(launch, rows, !measured.empty(), observes, TimedPhase::attend);
  launch.rows = device_rows(rows), launch.row_count = static_cast<int>(rows.size());
  if (!measured.empty())
    measure_look(span(), tasks_.data(), launch.row_count, measured_of_token_.data(), static_cast<int>(all.size()),
                 stream_);
  if (!measured.empty() && plan_.settings.mass) {
    launch.stage = Stage::measure;
    program_->launch(launch, trace_.data.kv_heads, row_bytes_, stream_);
  }
  if (!observes) return;
  launch.stage = Stage::observe;
  play(launch, TimedPhase::observe);
}

bool Batch::may_be_due(const BlockRange& block) const {
  if (!plan_.traits.compresses) return false;
  const int budget = allocated_ ? 0 : plan_.smallest_budget;  // an allocation may leave a head with next to nothing
  if (block.phase == Phase::prompt) return slots_bound_ > budget || !plan_.traits.needs_budget();
  return plan_.settings.compress == Compress::always && slots_bound_ > budget &&
         (block.first - trace_.data.prompt_tokens + 1) % plan_.traits.interval == 0;
}

bool Batch::any_more() {
  if (!in_rounds(plan_.traits)) return false;
  std::vector<Progress> progress(units_.size());
  KV_CUDA_TRY(cudaMemcpyAsync(progress.data(), progress_.data(), progress.size() * sizeof(Progress),
                              cudaMemcpyDeviceToHost, stream_));
  KV_CUDA_TRY(cudaStreamSynchronize(stream_));
  return std::ranges::any_of(progress, &Progress::more);
}

void Batch::compress(const BlockRange& block, bool probes) {
  const Traits& traits = plan_.traits;
  int window_rows = probes ? block.last - block.first : 1;
  const bool frozen = traits.window_once && block.phase == Phase::decode && compressions_ > 0;
  Launch launch = stage(Stage::score, block);
  launch.probing = probes;
  for (launch.first_round = true;; launch.first_round = false) {
    if (traits.observation_window > 0 && !frozen) {
      Launch window = launch;
      window.window = true;
      const std::vector<int> rows = tokens_between(std::max(0, block.last - traits.observation_window), block.last);
      if (traits.window_past) window.newest_key = rows.front() - 1;
      look(window, rows, false, true, TimedPhase::observe);
      window_rows = static_cast<int>(rows.size());
    }
    launch.row_count = window_rows;
    launch.stage = Stage::score;
    play(launch, TimedPhase::score);
    if (plan_.settings.allocation.kind == Allocation::Kind::adaptive && !allocated_) allocate();
    launch.stage = Stage::compress;
    play(launch, TimedPhase::compact);
    if (!any_more()) break;
    if (probes) probe(block, false);
  }
  ++compressions_;
  if (traits.needs_budget()) slots_bound_ = std::min(slots_bound_, plan_.largest_budget);
}

void Batch::allocate() {
  KV_CUDA_TRY(cudaStreamSynchronize(stream_));
  const std::vector<Progress> progress = progress_.to_host();
  std::vector<Unit> units = device_units_.to_host();
  const auto heads = static_cast<std::size_t>(trace_.data.kv_heads);
  for (std::size_t first = 0; first < units.size(); first += heads) {
    if (!progress[first].compressing) continue;
    std::vector<Candidates> candidates;
    for (std::size_t u = first; u < first + heads; ++u) {
      const auto n = static_cast<std::size_t>(progress[u].size);
      Candidates c{std::vector<float>(n), std::vector<Safety>(n)};
      static_assert(sizeof(Safety) == 1);
      KV_CUDA_TRY(cudaMemcpy(c.score.data(), units[u].score_at[0], n * sizeof(float), cudaMemcpyDeviceToHost));
      KV_CUDA_TRY(cudaMemcpy(c.safety.data(), units[u].safety_at[0], n, cudaMemcpyDeviceToHost));
      candidates.push_back(std::move(c));
    }
    const auto& settings = *points_[static_cast<std::size_t>(units[first].point)].settings;
    const std::vector<int> budgets = head_budgets(settings.allocation, units[first].info.budget, candidates);
    for (std::size_t h = 0; h < heads; ++h) units[first + h].info.budget = budgets[h];
  }
  to_device(device_units_.data(), units.data(), units.size() * sizeof(Unit));
  allocated_ = true;
}

int Batch::kept_tiles(int slots, int tile, std::size_t spilled) const {
  const TraceData& t = trace_.data;
  const auto of_slot = static_cast<std::size_t>((t.key_dim + t.value_dim) * bytes_of(t.elements));
  const auto resident = static_cast<std::size_t>(std::min(static_cast<int>(units_.size()), 2 * multiprocessors_));
  if (resident * of_slot * static_cast<std::size_t>(slots) <= l2_bytes_ / 5 * 4) return -1;
  const std::size_t half = l2_bytes_ / 2, taken = std::min(half, resident * spilled);
  return static_cast<int>((half - taken) / (resident * of_slot * static_cast<std::size_t>(tile)));
}

void Batch::steps(std::size_t first, std::size_t count, bool last_compresses) {
  if (count == 0) return;
  const BlockRange& begin = plan_.blocks[first];
  Launch launch = stage(Stage::steps, begin);
  launch.last = begin.first + static_cast<int>(count);
  launch.last_compresses = last_compresses, launch.plain_width = plain_width(trace_.data, header_, plan_);
  const bool compresses =
      plan_.traits.compresses && (begin.phase == Phase::prompt || plan_.settings.compress == Compress::always);
  launch.together = plan_.traits.scope == Scope::layer && trace_.data.kv_heads > 1 && compresses;
  const bool bounded = compresses && plan_.traits.needs_budget();
  launch.step_slots =
      std::min(plan_.capacity(), bounded ? std::max(slots_bound_, plan_.largest_budget) + plan_.traits.interval
                                         : slots_bound_ + static_cast<int>(count));
  const std::size_t wanted =
      program_->record_bytes(plan_.traits, launch.settings, trace_.data.group, trace_.data.key_dim, launch.step_slots);
  launch.record_bytes = static_cast<int>(std::min(wanted, record_room_));
  constexpr int wide_tile = tile_slots(128, long_ring);
  if (launch.plain_width == 128 && !launch.together && launch.step_slots > stream_warps * wide_tile &&
      wanted + row_bytes(long_ring) - row_bytes_ <= record_room_)
    launch.ring_bytes = long_ring, launch.maps = maps_.at(long_ring);
  const int width = stream_width(trace_.data.key_dim, trace_.data.value_dim);
  launch.settings.kept_tiles = kept_tiles(launch.step_slots, tile_slots(width, launch.ring_bytes),
                                          wanted - static_cast<std::size_t>(launch.record_bytes));
  const std::size_t shared = row_bytes(launch.ring_bytes) + static_cast<std::size_t>(launch.record_bytes);
  if (launch.together) KV_CUDA_TRY(cudaMemsetAsync(meeting_.data(), 0, meeting_.size() * sizeof(int), stream_));
  if (timing_ != Timing::none) step_timers_.push_back(std::make_unique<Timer>(TimedPhase::attend, stream_));
  program_->launch(launch, trace_.data.kv_heads, shared, stream_);
  if (timing_ != Timing::none) step_timers_.back()->stop(stream_);
  slots_bound_ = launch.step_slots;
}

void Batch::single_tokens(std::size_t first, std::size_t count) {
  if (plan_.settings.allocation.kind != Allocation::Kind::adaptive || allocated_) return steps(first, count, true);
  // Heads get their budgets at the first compression, by the host: up to there, then on.
  const int budget = points_.front().settings->budget;
  std::size_t before = 0;
  while (before < count) {
    const BlockRange& block = plan_.blocks[first + before];
    ++before;
    const bool over = slots_bound_ + static_cast<int>(before) > budget && plan_.traits.compresses;
    if (over &&
        (block.phase == Phase::prompt || (plan_.settings.compress == Compress::always &&
                                          (block.first - trace_.data.prompt_tokens + 1) % plan_.traits.interval == 0)))
      break;
  }
  steps(first, before, false);
  const BlockRange& block = plan_.blocks[first + before - 1];
  if (may_be_due(block)) compress(block, false);
  steps(first + before, count - before, true);
}

void Batch::run(cudaStream_t stream) {
  stream_ = stream, slots_bound_ = 0, compressions_ = 0;
  if (allocated_) to_device(device_units_.data(), units_.data(), units_.size() * sizeof(Unit));
  allocated_ = false;
  prompt_timers_.clear(), step_timers_.clear();
  KV_CUDA_TRY(cudaMemsetAsync(progress_.data(), 0, progress_.size() * sizeof(Progress), stream));
  KV_CUDA_TRY(cudaMemsetAsync(measures_.data(), 0xff, measures_.size() * sizeof(double), stream));  // NaN until written
  if (timing_ == Timing::phases)
    KV_CUDA_TRY(cudaMemsetAsync(clocks_.data(), 0, clocks_.size() * sizeof(unsigned), stream));
  const std::vector<BlockRange>& blocks = plan_.blocks;
  const bool probes = plan_.traits.probe != Probe::none;
  program_->launch(stage(Stage::begin, blocks.front()), trace_.data.kv_heads, row_bytes_, stream);
  if (plan_.traits.future_mass) {
    Launch launch = stage(Stage::future, blocks.front());
    launch.first = blocks.front().last, launch.last = trace_.data.tokens;
    program_->launch(launch, trace_.data.kv_heads, row_bytes_, stream);
  }
  const auto alone = [&](std::size_t i) {
    return blocks[i].last - blocks[i].first == 1 && !(probes && blocks[i].phase == Phase::prompt);
  };
  for (std::size_t i = 0; i < blocks.size();) {
    std::size_t count = 0;
    while (i + count < blocks.size() && alone(i + count) && blocks[i + count].phase == blocks[i].phase) ++count;
    if (count > 0) {
      single_tokens(i, count);
      i += count;
      continue;
    }
    const BlockRange& block = blocks[i++];
    if (probes && block.phase == Phase::prompt && block.first > 0) {
      const bool due = may_be_due(block);
      if (due || plan_.traits.probe == Probe::always) probe(block, true);
      if (due) compress(block, true);
    }
    take(block);
    if (!probes && may_be_due(block)) compress(block, false);
  }
  finish();
}

}  // namespace kv
