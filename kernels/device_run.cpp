// A device's points: batches run in waves. Layers come in pieces: one replays while the next is read and copied, as far as
// memory allows.
#include "kernels/device_run.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <span>

#include "kernels/batch.hpp"

namespace kv {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t wave = 8;             // batches under way at once
constexpr int units_a_multiprocessor = 32;  // of a piece of layers: with fewer, what its last units leave idle counts

/// A point's result while its layers go by.
struct PointState {
  std::size_t index;  // among the caller's points
  DevicePoint point;
  ReplayResult result;
  std::exception_ptr error;
  std::vector<BatchTimes> times;  // [repeat], summed over layers
  double seconds = 0;
};

/// Points of one policy that can go together, and what they have in common.
struct Group {
  BatchPlan plan;
  std::vector<PointState*> points;
  std::size_t unit_bytes = 0;
};

/// One device's share of the points.
class DeviceRun {
 public:
  DeviceRun(SharedSession& session, std::vector<PointState> points, const DeviceOptions& options, Outbox& outbox)
      : session_(session),
        header_(session.session.header()),
        points_(std::move(points)),
        outbox_(outbox),
        trace_(header_) {
    std::size_t free = 0, total = 0;
    KV_CUDA_TRY(cudaMemGetInfo(&free, &total));
    const std::size_t own = trace_.bytes();
    allowed_ = options.memory > 0 ? std::min(options.memory, free + own) : free / 10 * 9 + own;
    memory_ = allowed_ - std::min(allowed_, own);
    for (std::size_t i = 0; i < wave; ++i) streams_.push_back(std::make_unique<Stream>());
    began_.record(streams_.front()->id);
  }

  void run() {
    make_groups();
    if (groups_.empty()) return finish_wave(0, true);
    for (std::vector<Group> waiting = std::move(groups_); !waiting.empty() && !outbox_.stopped();) {
      groups_ = take_together(waiting);
      pass();
    }
  }

  /// Seconds in which batches were under way.
  double busy() {
    std::ranges::sort(busy_);
    double sum = 0, until = 0;
    for (const auto& [begin, end] : busy_) {
      sum += std::max(0.0, end - std::max(begin, until));
      until = std::max(until, end);
    }
    return sum;
  }

 private:
  /// All layers by, for the groups that are present.
  void pass() {
    ask_for_layers();
    const auto [at_once, ahead] = divide_layers();
    LayerFeed feed(trace_, session_, outbox_, needs_, at_once, ahead);
    const int layers = static_cast<int>(header_.layers.size());
    for (int first = 0; first < layers; first += at_once) {
      const int last = std::min(first + at_once, layers);
      layers_.clear();  // before the next ones come, where they are not there yet
      layers_ = feed.next();
      if (outbox_.stopped()) return;
      resident_ = layer_bytes_ * (layers_.size() + feed.under_way());
      for (const std::vector<int>& tokens : needs_.floors_of)
        for (std::size_t l = 0; l < layers_.size(); ++l)
          layers_[l]->add_floor(trace_, first + static_cast<int>(l), *floors_.at(tokens), streams_.front()->id);
      for (Group& group : groups_) run_group(group, first, last == layers);
      finish_wave(first, last == layers);
    }
  }

  struct Underway {
    std::unique_ptr<Batch> batch;
    Group* group;
    std::vector<PointState*> points;
    std::size_t bytes;
    Clock::time_point start;
    std::unique_ptr<Event> begin, end;  // around its launches
  };

  void make_groups() {
    for (PointState& state : points_) {
      state.result = empty_result(header_, *state.point.settings);
      const auto like = std::ranges::find_if(
          groups_, [&](const Group& group) { return BatchPlan::alike(group.points.front()->point, state.point); });
      if (like == groups_.end())
        groups_.push_back({BatchPlan(header_, {state.point}), {&state}, 0});
      else
        like->points.push_back(&state);
    }
    for (Group& group : groups_) {
      // A cache can hold at most what its budget lets it: points of like budgets share memory best.
      std::ranges::stable_sort(group.points, {}, [](PointState* s) { return s->point.settings->budget; });
      const BoundPolicy* policy = group.points.front()->point.policy;
      const auto program = make_device_program(group.points.front()->point.entry->doc.name, {&policy, 1});
      for (; !group.points.empty(); group.points.pop_back()) {  // the largest budget decides what they all take
        group.plan = BatchPlan(header_, device_points(group.points));
        group.unit_bytes = Batch::bytes_of_unit(trace_.data, group.plan, *program);
        const std::size_t least = least_bytes({&group, 1});
        if (least <= allowed_) break;
        group.points.back()->error = over_device_memory(least, allowed_);
      }
    }
    std::erase_if(groups_, [](const Group& group) { return group.points.empty(); });
  }

  /// What a layer and one point at a time of these groups take.
  std::size_t least_bytes(std::span<const Group> groups) const {
    std::size_t largest = 0;
    for (const Group& group : groups) largest = std::max(largest, point_bytes(group));
    return trace_.bytes() + largest_layer(full_rows(groups)) + largest;
  }

  /// Queries of which a layer keeps full attention for these groups: each list of them once.
  static FullRows full_rows(std::span<const Group> groups) {
    std::set<std::vector<int>> lists;
    std::set<Prefill> prefills;
    for (const Group& group : groups) lists.insert(group.plan.settings.measured), prefills.insert(group.plan.prefill);
    FullRows rows;
    for (const std::vector<int>& list : lists) rows.measured += list.size();
    for (const Prefill& prefill : prefills) rows.prefilled += static_cast<std::size_t>(prefill.rows());
    return rows;
  }

  /// The first of the groups that wait, and those that fit beside it: what they measure of a layer is there together.
  std::vector<Group> take_together(std::vector<Group>& waiting) const {
    std::vector<Group> taken, others;
    for (Group& group : waiting) {
      taken.push_back(std::move(group));
      if (taken.size() == 1 || least_bytes(taken) <= allowed_) continue;
      others.push_back(std::move(taken.back()));
      taken.pop_back();
    }
    waiting = std::move(others);
    return taken;
  }

  /// What the points that are present want of every layer.
  void ask_for_layers() {
    needs_ = {};
    const bool has_outputs = std::ranges::all_of(header_.layers, &LayerInfo::has_o);
    for (const Group& group : groups_) {
      const std::vector<int>& measured = group.plan.settings.measured;
      needs_.norms = needs_.norms || group.plan.traits.output_norm;
      if (!has_outputs || floors_.contains(measured)) continue;
      needs_.floors_of.push_back(measured);
      floors_[measured] = std::make_shared<ReplayResult>(group.points.front()->result);
    }
  }

  std::size_t largest_layer(const FullRows& rows) const {  // bytes
    std::size_t most = 0;
    for (std::size_t l = 0; l < header_.layers.size(); ++l)
      most = std::max(most, DeviceLayer::bytes(header_, static_cast<int>(l), trace_.data.elements, rows));
    return most;
  }

  static std::vector<DevicePoint> device_points(const std::vector<PointState*>& states) {
    std::vector<DevicePoint> points;
    for (const PointState* state : states) points.push_back(state->point);
    return points;
  }

  std::size_t point_bytes(const Group& group) const {  // over one layer
    return group.unit_bytes * static_cast<std::size_t>(trace_.data.kv_heads);
  }

  /// How many layers replay together, and whether the next ones come meanwhile: as many as fit beside one point of the
  /// largest group, at least one. Where no pass is timed, which wants all layers at once, and others fit too, these are on
  /// their way meanwhile; then no more replay than keep the device busy.
  std::pair<int, bool> divide_layers() {
    std::size_t largest = 0, points = 0;
    bool timed = false;
    for (const Group& group : groups_) {
      largest = std::max(largest, point_bytes(group));
      points += group.points.size();
      for (const PointState* state : group.points) timed = timed || state->point.settings->timing_repeats > 0;
    }
    layer_bytes_ = largest_layer(full_rows(groups_));
    const bool ahead = !timed && memory_ >= 2 * layer_bytes_ + largest;
    std::size_t fit = memory_ / ((ahead ? 2 : 1) * layer_bytes_ + largest);
    if (ahead) {
      int device = 0, multiprocessors = 0;
      KV_CUDA_TRY(cudaGetDevice(&device));
      KV_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
      const std::size_t units = points * static_cast<std::size_t>(trace_.data.kv_heads),
                        wanted = static_cast<std::size_t>(units_a_multiprocessor * multiprocessors);
      fit = std::min(fit, (wanted + units - 1) / units);
    }
    return {static_cast<int>(std::clamp<std::size_t>(fit, 1, header_.layers.size())), ahead};
  }

  void run_group(Group& group, int first_layer, bool last) {
    const std::size_t layers = layers_.size(), room = memory_ - std::min(memory_, resident_);
    const std::size_t one = point_bytes(group) * layers,
                      fit = std::max<std::size_t>(1, room / std::max<std::size_t>(1, one));
    for (std::size_t first = 0; first < group.points.size(); first += fit) {
      if (outbox_.stopped()) return;
      std::vector<PointState*> points(
          group.points.begin() + static_cast<std::ptrdiff_t>(first),
          group.points.begin() + static_cast<std::ptrdiff_t>(std::min(first + fit, group.points.size())));
      std::erase_if(points, [](const PointState* s) { return s->error != nullptr; });
      if (points.empty()) continue;
      const std::size_t bytes = one * points.size();
      if (underway_.size() == wave || (!underway_.empty() && used_ + bytes > room)) finish_wave(first_layer, last);
      start(group, points, bytes, first_layer, last);
    }
  }

  std::vector<BatchLayer> layers_for(const Group& group, cudaStream_t stream) {
    std::vector<BatchLayer> all;
    for (const auto& layer : layers_)
      all.push_back({layer->seen(trace_, group.plan.settings.measured, group.plan.prefill, stream), layer->wo()});
    return all;
  }

  /// One batch. When memory is short after all, what is under way ends first, then halves are tried.
  void start(Group& group, const std::vector<PointState*>& points, std::size_t bytes, int first_layer, bool last) {
    const cudaStream_t stream = streams_[underway_.size()]->id;
    try {
      auto batch = std::make_unique<Batch>(trace_, header_, group.plan, device_points(points),
                                           layers_for(group, stream), first_layer, Timing::none);
      auto begin = std::make_unique<Event>(), end = std::make_unique<Event>();
      const Clock::time_point start = Clock::now();
      begin->record(stream);
      batch->run(stream);
      end->record(stream);
      underway_.push_back({std::move(batch), &group, points, bytes, start, std::move(begin), std::move(end)});
      used_ += bytes;
    } catch (const CudaError&) {
      const std::exception_ptr error = std::current_exception();
      const bool alone = underway_.empty();
      finish_wave(first_layer, last);
      if (alone && points.size() == 1) {
        points.front()->error = error;
        return;
      }
      const auto middle = points.begin() + static_cast<std::ptrdiff_t>(points.size() / 2);
      for (const auto& half : {std::vector(points.begin(), middle), std::vector(middle, points.end())})
        if (!half.empty()) start(group, half, bytes / 2, first_layer, last);
    } catch (const std::exception&) {
      for (PointState* state : points) state->error = std::current_exception();
    }
  }

  /// Collects what is under way, times it, and hands out what is finished.
  void finish_wave(int first_layer, bool last) {
    for (std::size_t i = 0; i < underway_.size(); ++i) collect(underway_[i], streams_[i]->id);
    std::vector<Underway> done = std::move(underway_);
    underway_.clear();
    used_ = 0;
    for (Underway& run : done) {
      run.batch.reset();
      for (PointState* state : run.points)
        if (!state->error && !outbox_.stopped()) time_point(*run.group, *state, first_layer);
    }
    for (PointState& state : points_)
      if (state.error && !handed_.contains(state.index)) hand_out(state);
    for (const Underway& run : done)
      for (PointState* state : run.points)
        if (last && !handed_.contains(state->index)) hand_out(*state);
  }

  void collect(Underway& run, cudaStream_t stream) {
    std::vector<ReplayResult> results;
    std::vector<std::exception_ptr> errors(run.points.size());
    for (PointState* state : run.points) results.push_back(std::move(state->result));
    try {
      run.batch->collect(results, errors, stream);
      busy_.emplace_back(run.begin->since(began_), run.end->since(began_));
    } catch (const std::exception&) {
      std::ranges::fill(errors, std::current_exception());
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - run.start).count();
    for (std::size_t p = 0; p < run.points.size(); ++p) {
      run.points[p]->result = std::move(results[p]);
      run.points[p]->error = errors[p];
      run.points[p]->seconds += seconds / static_cast<double>(run.points.size());
    }
  }

  /// Timed passes of one point alone on the device, each checked to keep exactly what the measured pass kept.
  void time_point(Group& group, PointState& state, int first_layer) {
    const auto repeats = static_cast<std::size_t>(state.point.settings->timing_repeats);
    if (repeats == 0) return;
    const cudaStream_t stream = streams_.front()->id;
    ReplaySettings settings = *state.point.settings;
    settings.mass = false;  // nothing is measured that the policy does not need
    const DevicePoint point{state.point.entry, state.point.policy, &settings};
    try {
      const BatchPlan plan(header_, {point});
      Batch batch(trace_, header_, plan, {point}, layers_for(group, stream), first_layer, Timing::phases);
      state.times.resize(repeats);
      for (BatchTimes& times : state.times) {
        batch.run(stream);
        const BatchTimes mine = batch.times(stream);
        std::vector<ReplayResult> again(1, empty_result(header_, *state.point.settings));
        std::vector<std::exception_ptr> errors(1);
        batch.collect(again, errors, stream);
        for (std::size_t i = 0; i < again[0].final_position.size(); ++i)
          KV_CHECK(again[0].final_position[i].empty() || again[0].final_position[i] == state.result.final_position[i]);
        if (times.step_us.empty())
          times.step_us.resize(mine.step_us.size(), std::vector<double>(mine.step_us[0].size()));
        for (std::size_t phase = 0; phase < timed_phases; ++phase) {
          times.prompt_us[phase] += mine.prompt_us[phase];
          for (std::size_t step = 0; step < mine.step_us[phase].size(); ++step)
            times.step_us[phase][step] += mine.step_us[phase][step];
        }
      }
    } catch (const std::exception&) {
      state.error = std::current_exception();
    }
  }

  void hand_out(PointState& state) {
    handed_.insert(state.index);
    DeviceOutcome outcome;
    outcome.error = state.error, outcome.seconds = state.seconds;
    if (!state.error) {
      ReplayResult& r = state.result;
      const Traits traits = state.point.policy->traits();
      r.leaks = r.compressions > 0 && sees_measured_queries_early(header_, traits, *state.point.settings);
      if (!state.times.empty()) add_repeats(r, state.times);
      if (const auto floor = floors_.find(r.measured); floor != floors_.end()) outcome.floor = floor->second;
      outcome.result = std::move(r);
    }
    outbox_.put(state.index, std::move(outcome));
  }

  static void add_repeats(ReplayResult& result, const std::vector<BatchTimes>& times) {
    const std::size_t steps = times.front().step_us.front().size();
    std::vector<std::vector<std::vector<double>>> us(timed_phases,
                                                     std::vector(steps, std::vector<double>(times.size())));
    std::vector<std::vector<double>> prompt(timed_phases, std::vector<double>(times.size()));
    for (std::size_t repeat = 0; repeat < times.size(); ++repeat)
      for (std::size_t phase = 0; phase < timed_phases; ++phase) {
        prompt[phase][repeat] = times[repeat].prompt_us[phase];
        for (std::size_t step = 0; step < steps; ++step) us[phase][step][repeat] = times[repeat].step_us[phase][step];
      }
    add_times(result, us, prompt);
  }

  SharedSession& session_;
  const TraceHeader& header_;
  std::vector<PointState> points_;
  Outbox& outbox_;
  DeviceTrace trace_;
  std::size_t allowed_ = 0, memory_ = 0;  // bytes in all, and without what the trace itself takes
  std::size_t layer_bytes_ = 0;           // of the largest
  std::size_t resident_ = 0, used_ = 0;   // bytes of layers, present and on their way, and of batches
  LayerNeeds needs_;
  std::vector<Group> groups_;
  LayerFeed::Layers layers_;
  std::map<std::vector<int>, std::shared_ptr<ReplayResult>>
      floors_;  // by measured tokens; empty without recorded outputs
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Underway> underway_;
  std::set<std::size_t> handed_;
  Event began_;
  std::vector<std::pair<double, double>> busy_;  // seconds from began_: a batch's first and last
};

}  // namespace

double replay_on_current_device(SharedSession& session, const std::vector<DealtPoint>& points,
                                const DeviceOptions& options, Outbox& outbox) {
  std::vector<PointState> states;
  for (const auto& [index, point] : points) states.push_back({index, point, {}, nullptr, {}, 0});
  DeviceRun run(session, std::move(states), options, outbox);
  run.run();
  return run.busy();
}

}  // namespace kv
