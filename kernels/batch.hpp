// Points of one policy that go through a trace together: equal blocks, positions and measured queries; budgets, seeds and
// most parameters may differ. Their heads are the units of every launch.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "kernels/device_layer.hpp"
#include "kernels/device_program.hpp"
#include "kernels/engine.hpp"
#include "kernels/unit_kernels.hpp"

namespace kv {

/// What is the same for all points of a batch.
struct BatchPlan {
  std::vector<BlockRange> blocks;
  Traits traits;
  bool observes = false, biases = false, merges = false;  // the policy has such a hook and these parameters use it
  bool has_wo = false;                                    // in any layer of the trace
  ReplaySettings settings;                                // of the first point; budget and seed are each unit's own
  int smallest_budget = 0, largest_budget = 0;            // over points and layers
  Prefill prefill;                                        // what looks at the first block find known, or empty

  /// Whether two points can be in one batch.
  static bool alike(const DevicePoint& a, const DevicePoint& b);
  BatchPlan(const TraceHeader& header, const std::vector<DevicePoint>& points);

  int capacity() const;     // most slots that a unit can hold
  int look_rows() const;    // most query rows of one look at a block
  int output_rows() const;  // the same for looks that want outputs
  bool needs_full_logits() const { return traits.future_mass || settings.mass; }
};

/// What a pass takes the time of: nothing, every launch by events, or also the phases of every step by clocks in the
/// kernel, which cost a little themselves.
enum class Timing { none, launches, phases };

/// Microseconds of one timed pass.
struct BatchTimes {
  std::vector<double> prompt_us = std::vector<double>(timed_phases);  // [phase]
  std::vector<std::vector<double>> step_us;                           // [phase][decode step]
};

/// One layer as a batch uses it.
struct BatchLayer {
  LayerData data;
  const float* wo = nullptr;  // [hidden][query_heads * value_dim] or null
};

/// The batch over some layers of the trace.
class Batch {
 public:
  /// Throws CudaError when the memory is not there.
  Batch(const DeviceTrace& trace, const TraceHeader& header, const BatchPlan& plan,
        const std::vector<DevicePoint>& points, const std::vector<BatchLayer>& layers, int first_layer, Timing timing);

  /// Bytes of device memory that one point takes over one layer.
  static std::size_t bytes_of_unit(const TraceData& trace, const BatchPlan& plan, const DeviceProgram& program);

  /// Through all blocks. Asynchronous but where the flow depends on what happened.
  void run(cudaStream_t stream);

  /// Writes what was measured into results[point], of layers [first_layer, ...). Throws what the first unit of a point
  /// that failed has to say into errors[point] instead. Waits for the stream.
  void collect(std::vector<ReplayResult>& results, std::vector<std::exception_ptr>& errors, cudaStream_t stream);

  BatchTimes times(cudaStream_t stream);  // after run() with Timing::phases

  /// Microseconds that the launches of single tokens took, after run() with timing.
  double steps_us(cudaStream_t stream) const;
  double prompt_us(cudaStream_t stream) const;  // the same of all other timed launches

 private:
  /// Events around the launches of one phase.
  struct Timer {
    Timer(TimedPhase phase, cudaStream_t stream);
    ~Timer();
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    void stop(cudaStream_t stream);
    double microseconds() const;
    TimedPhase phase;
    cudaEvent_t begin = nullptr, end = nullptr;
  };
  UnitSpan span() const;
  void make_units(const std::vector<DevicePoint>& points);
  /// Shared memory of a row whose streams have rings of so many bytes.
  std::size_t row_bytes(int ring_bytes) const;
  /// maps_ of all units' rows.
  void make_maps(std::size_t unit_bytes);
  Launch stage(Stage what, const BlockRange& block) const;
  void play(const Launch& launch, TimedPhase phase);
  void look(Launch launch, const std::vector<int>& rows, bool outputs, bool sums, TimedPhase phase);
  void probe(const BlockRange& block, bool first_round);
  void gradients(const Launch& launch, const std::vector<int>& rows);
  void take(const BlockRange& block);
  void compress(const BlockRange& block, bool probes);
  void allocate();
  void steps(std::size_t first, std::size_t count, bool last_compresses);
  /// RowLook::kept_tiles of steps over so many slots, `tile` at a time: half of the second-level cache, less what a unit's
  /// records take there, of caches that it cannot hold.
  int kept_tiles(int slots, int tile, std::size_t spilled) const;
  void single_tokens(std::size_t first, std::size_t count);
  bool may_be_due(const BlockRange& block) const;
  bool any_more();
  void finish();
  const int* device_rows(const std::vector<int>& rows);

  const DeviceTrace& trace_;
  const TraceHeader& header_;
  const BatchPlan& plan_;
  std::vector<BatchLayer> layers_;
  std::vector<DevicePoint> points_;
  int first_layer_;
  Timing timing_;
  std::unique_ptr<DeviceProgram> program_;
  std::size_t row_bytes_ = 0, record_room_ = 0;  // row_bytes(short_ring), and what is left then for StepRecords
  std::size_t l2_bytes_ = 0;
  int multiprocessors_ = 0;

  std::vector<Unit> units_;
  Buffer<char> memory_;                                              // every unit's arrays
  std::map<int, TileMaps> maps_{{short_ring, {}}, {long_ring, {}}};  // by bytes of a warp's ring
  Buffer<Unit> device_units_;
  Buffer<Progress> progress_;
  Buffer<LayerData> device_layers_;
  Buffer<AttentionTask> tasks_;
  Buffer<KeyGradientTask> gradient_tasks_;
  Buffer<LostMassTask> lost_tasks_;
  Buffer<int> measured_, measured_of_token_, every_token_, meeting_;
  Buffer<double> measures_;  // [metric][unit][group][measured]
  Buffer<float> delta_;
  Buffer<double> wo_error2_, wo_output2_;  // [point][layer][measured]
  Buffer<int> slots_;                      // [unit][steps]
  Buffer<unsigned> clocks_;
  Buffer<double> lost_masses_;  // [unit][measured][group]
  std::vector<std::pair<std::vector<int>, Buffer<int>>> row_lists_;

  cudaStream_t stream_ = nullptr;
  int slots_bound_ = 0;     // most slots that a unit may hold now
  int compressions_ = 0;    // that may have begun
  bool allocated_ = false;  // adaptive: heads have their budgets
  std::vector<std::unique_ptr<Timer>> prompt_timers_, step_timers_;
};

}  // namespace kv
