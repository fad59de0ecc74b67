// Points of a trace over devices: dealt into batches, batches run in waves, layers in as many pieces as memory asks for.
#include "kernels/engine.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "kernels/batch.hpp"
#include "kernels/outbox.hpp"

namespace kv {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t wave = 8;  // batches under way at once

std::map<std::string, MakeDeviceProgram>& programs() {
  static std::map<std::string, MakeDeviceProgram> all;  // built on first use: registrars run before main in any order
  return all;
}

/// A session that several devices read from.
struct SharedSession {
  Session& session;
  std::mutex mutex;
};

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

struct Stream {
  Stream() { KV_CUDA_TRY(cudaStreamCreateWithFlags(&id, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(id); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t id = nullptr;
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
    memory_ = options.memory > 0 ? std::min(options.memory, free) : free / 10 * 9;
    for (std::size_t i = 0; i < wave; ++i) streams_.push_back(std::make_unique<Stream>());
  }

  void run() {
    make_groups();
    if (groups_.empty()) return finish_wave(0, true);
    const int layers = static_cast<int>(header_.layers.size()), at_once = layers_at_once();
    for (int first = 0; first < layers && !outbox_.stopped(); first += at_once) {
      const int last = std::min(first + at_once, layers);
      layers_.clear();
      for (int l = first; l < last; ++l) {
        const std::lock_guard lock(session_.mutex);
        layers_.push_back(std::make_unique<DeviceLayer>(trace_, session_.session, l, wants_norms_));
      }
      for (Group& group : groups_) run_group(group, first, last == layers);
      finish_wave(first, last == layers);
    }
  }

 private:
  struct Underway {
    std::unique_ptr<Batch> batch;
    Group* group;
    std::vector<PointState*> points;
    std::size_t bytes;
    Clock::time_point start;
  };

  void make_groups() {
    for (PointState& state : points_) {
      state.result = empty_result(header_, *state.point.settings);
      wants_norms_ = wants_norms_ || state.point.policy->traits().output_norm;
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
        const std::size_t least = largest_layer(group.plan.settings.measured.size()) + point_bytes(group);
        if (least <= memory_) break;
        group.points.back()->error = over_device_memory(least, memory_);
      }
    }
    std::erase_if(groups_, [](const Group& group) { return group.points.empty(); });
  }

  std::size_t largest_layer(std::size_t measured) const {  // bytes
    std::size_t most = 0;
    for (std::size_t l = 0; l < header_.layers.size(); ++l)
      most = std::max(most, DeviceLayer::bytes(header_, static_cast<int>(l), trace_.data.elements, measured));
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

  /// As many layers as fit beside one point of the largest group; at least one.
  int layers_at_once() {
    std::size_t largest = 0, measured = 0;
    for (const Group& group : groups_) {
      largest = std::max(largest, point_bytes(group));
      measured += group.plan.settings.measured.size();
    }
    layer_bytes_ = largest_layer(measured);
    const std::size_t fit = memory_ / (layer_bytes_ + largest);
    return static_cast<int>(std::clamp<std::size_t>(fit, 1, header_.layers.size()));
  }

  void run_group(Group& group, int first_layer, bool last) {
    const std::size_t layers = layers_.size(), room = memory_ - std::min(memory_, layer_bytes_ * layers);
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
      all.push_back({layer->measured(trace_, group.plan.settings.measured, stream), layer->wo()});
    return all;
  }

  /// One batch. When memory is short after all, what is under way ends first, then halves are tried.
  void start(Group& group, const std::vector<PointState*>& points, std::size_t bytes, int first_layer, bool last) {
    const cudaStream_t stream = streams_[underway_.size()]->id;
    try {
      auto batch = std::make_unique<Batch>(trace_, header_, group.plan, device_points(points),
                                           layers_for(group, stream), first_layer, Timing::none);
      const Clock::time_point begin = Clock::now();
      batch->run(stream);
      underway_.push_back({std::move(batch), &group, points, bytes, begin});
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
  std::size_t memory_ = 0, layer_bytes_ = 0, used_ = 0;
  bool wants_norms_ = false;
  std::vector<Group> groups_;
  std::vector<std::unique_ptr<DeviceLayer>> layers_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Underway> underway_;
  std::set<std::size_t> handed_;
};

/// A device's thread: whatever goes wrong becomes the error of every point that has no outcome yet.
void work(int device, SharedSession& session, std::vector<PointState> points, const DeviceOptions& options,
          Outbox& outbox) {
  std::vector<std::size_t> waiting;
  for (const PointState& state : points) waiting.push_back(state.index);
  try {
    KV_CUDA_TRY(cudaSetDevice(device));
    DeviceRun(session, std::move(points), options, outbox).run();
  } catch (const std::exception&) {
    for (const std::size_t index : waiting) outbox.put(index, {{}, std::current_exception(), 0});
  }
  outbox.worker_ended();
}

}  // namespace

std::unique_ptr<DeviceProgram> make_device_program(const std::string& name,
                                                   std::span<const BoundPolicy* const> points) {
  const auto make = programs().find(name);
  if (make == programs().end()) throw ConfigError("policy: '" + name + "' was not compiled for the device");
  return make->second(points);
}

bool register_device_program(const char* name, MakeDeviceProgram make) {
  return programs().emplace(name, std::move(make)).second;
}

std::vector<DeviceInfo> devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<DeviceInfo> all;
  for (int d = 0; d < count; ++d) {
    cudaDeviceProp properties;
    KV_CUDA_TRY(cudaGetDeviceProperties(&properties, d));
    all.push_back({properties.name, properties.totalGlobalMem, properties.multiProcessorCount});
  }
  return all;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? "the driver shows no GPU" : cudaGetErrorString(status);
}

void replay_on_device(Session& session, std::span<const DevicePoint> points, const DeviceOptions& options,
                      const std::function<bool(std::size_t, DeviceOutcome)>& finished) {
  const auto count = devices().size();
  if (count == 0) throw CudaError("no GPU: " + why_no_device());
  std::vector<std::vector<PointState>> shares(std::min(count, std::max<std::size_t>(1, points.size())));
  std::vector<bool> told(points.size());
  for (std::size_t i = 0; i < points.size(); ++i) {
    PointState state{i, points[i], {}, nullptr, {}, 0};
    try {
      check_point(session.header(), *points[i].entry, *points[i].policy, *points[i].settings);
    } catch (const std::exception&) {
      told[i] = true;
      if (!finished(i, {{}, std::current_exception(), 0})) return;
      continue;
    }
    shares[i % shares.size()].push_back(std::move(state));
  }
  SharedSession shared{session, {}};
  Outbox outbox;
  std::vector<std::thread> threads;
  for (std::size_t d = 0; d < shares.size(); ++d)
    threads.emplace_back(work, static_cast<int>(d), std::ref(shared), std::move(shares[d]), std::cref(options),
                         std::ref(outbox));
  std::exception_ptr thrown;  // by the caller's function: told when all devices have come to rest
  while (auto outcome = outbox.take(threads.size())) {
    if (told[outcome->first] || thrown) continue;
    told[outcome->first] = true;
    try {
      if (!finished(outcome->first, std::move(outcome->second))) outbox.stop();
    } catch (...) {
      thrown = std::current_exception();
      outbox.stop();
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace kv
