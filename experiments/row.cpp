#include "experiments/row.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>

namespace kv {
namespace {

Row number(std::optional<double> x) { return x && std::isfinite(*x) ? Row(*x) : Row(nullptr); }

Row numbers(const std::vector<std::optional<double>>& values) {
  Row list = Row::array();
  for (const auto& x : values) list.push_back(number(x));
  return list;
}

void add_summary(Row& row, const std::string& name, const Summary& summary) {
  row[name + ".mean"] = number(summary.mean);
  row[name + ".p50"] = number(summary.p50);
  row[name + ".p95"] = number(summary.p95);
  row[name + ".p99"] = number(summary.p99);
  row[name + ".max"] = number(summary.max);
  row[name + ".cvar95"] = number(summary.cvar95);
  row[name + ".layer"] = numbers(summary.layer);
}

void add_errors(Row& row, const Metrics& metrics, const NoiseFloor& floor) {
  row["nmse"] = number(metrics.nmse);
  row["nmse.layer"] = numbers(metrics.nmse_layer);
  row["nmse.early_ratio"] = number(metrics.early_ratio);
  row["nmse.early_heavy"] = metrics.early_heavy;
  add_summary(row, "rel_l2", metrics.rel_l2);
  row["rel_l2.undefined"] = metrics.undefined_queries;
  add_summary(row, "cosine", metrics.cosine);
  add_summary(row, "lost_mass", metrics.lost_mass);
  if (metrics.rel_l2_wo) add_summary(row, "rel_l2_wo", *metrics.rel_l2_wo);
  if (metrics.mass_tv) add_summary(row, "mass_tv", *metrics.mass_tv);
  row["sums.error2"] = metrics.error2_sums;
  row["sums.output2"] = metrics.output2_sums;
  row["noise_floor.nmse"] = number(floor.nmse);
  row["noise_floor.rel_l2.mean"] = number(floor.rel_l2_mean);
}

void add_held(Row& row, const Held& held) {
  row["bytes.full"] = held.full;
  row["bytes.full_mean"] = held.full_mean;
  row["bytes.cache_mean"] = held.cache_mean;
  row["bytes.cache_peak"] = held.cache_peak;
  row["bytes.cache_final"] = held.cache_final;
  row["bytes.metadata"] = held.metadata_mean;
  row["slots.decode_mean"] = number(held.slots_decode_mean);
  row["slots.mean"] = held.slots_mean;
  row["slots.min"] = held.slots_min;
  row["slots.peak"] = held.slots_peak;
}

/// The phases' times; all null when nothing was timed.
void add_times(Row& row, const ReplayResult& result) {
  const bool timed = !result.us.empty() && !result.us.front().empty();
  std::vector<double> steps(timed ? result.us.front().size() : 0);
  std::vector<double> typical;  // p50 of each phase
  const auto add = [&](const std::string& name, const std::vector<double>& us) {
    row["us." + name + ".p50"] = number(percentile(us, 50));
    row["us." + name + ".p95"] = number(percentile(us, 95));
  };
  for (std::size_t phase = 0; phase < timed_phases; ++phase) {
    const std::vector<double> us = timed ? result.us.at(phase) : std::vector<double>{};
    for (std::size_t step = 0; step < us.size(); ++step) steps[step] += us[step];
    typical.push_back(percentile(us, 50).value_or(std::numeric_limits<double>::quiet_NaN()));
    add(timed_phase_names[phase], us);
  }
  add("step", steps);
  for (std::size_t phase = 0; phase < timed_phases; ++phase)
    row[std::string("us.prompt.") + timed_phase_names[phase]] =
        number(result.prompt_us.empty() ? std::nullopt : std::optional(result.prompt_us[phase]));
  const auto of = [&](TimedPhase phase) { return typical[static_cast<std::size_t>(phase)]; };
  const double own = of(TimedPhase::observe) + of(TimedPhase::score) + of(TimedPhase::select) + of(TimedPhase::compact);
  row["us.policy_overhead"] = number(own / of(TimedPhase::attend));  // not finite, so null, without times
  row["us.noise"] = number(timed ? result.timing_noise : std::numeric_limits<double>::quiet_NaN());
}

/// How many final slots count as 1, 2, 3, ... tokens: two lists of one length.
void add_multiplicities(Row& row, const ReplayResult& result) {
  std::map<std::int64_t, std::int64_t> slots;
  for (const auto& head : result.final_multiplicity)
    for (const std::int64_t m : head) ++slots[m];
  Row values = Row::array(), counts = Row::array();
  for (const auto& [multiplicity, count] : slots) values.push_back(multiplicity), counts.push_back(count);
  row["multiplicity.values"] = values;
  row["multiplicity.slots"] = counts;
}

/// Quantiles of the number that a policy notes of each merge.
void add_notes(Row& row, const std::string& name, const std::vector<float>& notes) {
  const std::vector<double> all(notes.begin(), notes.end());
  for (const int p : {5, 50, 95, 99}) row[fmt::format("merge.{}.p{}", name, p)] = number(percentile(all, p));
  row[fmt::format("merge.{}.max", name)] = number(percentile(all, 100));
}

/// Of this program alone: getrusage's peak also counts the process that it was forked from.
std::size_t process_peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (std::size_t kib = 0; word == "VmHWM:" && status >> kib) return kib * 1024;
  return 0;
}

/// Indices of the steps whose block contains a measured token.
std::vector<std::size_t> measured_steps(const ReplayResult& result) {
  std::vector<std::size_t> steps;
  auto token = result.measured.begin();
  for (std::size_t step = 0; step < result.step_token.size(); ++step) {
    const auto end = std::upper_bound(token, result.measured.end(), result.step_token[step]);
    if (end != token) steps.push_back(step);
    token = end;
  }
  return steps;
}

}  // namespace

Held held_of(const ReplayResult& result, const TraceHeader& header, const SlotBytes& bytes) {
  Held held;
  const std::size_t heads = static_cast<std::size_t>(result.layers) * static_cast<std::size_t>(result.kv_heads);
  const std::size_t all_steps = result.step_token.size();
  const auto slots = [&](std::size_t head, std::size_t step) { return result.slots[head * all_steps + step]; };
  const std::vector<std::size_t> steps = measured_steps(result);
  const std::size_t full_slot = bytes.payload + sizeof(std::int32_t);  // a token's position is all its metadata
  held.full = heads * static_cast<std::size_t>(header.tokens) * full_slot;
  held.slots_min = std::numeric_limits<int>::max();
  std::size_t total = 0;   // slots of all heads and measured steps
  std::size_t tokens = 0;  // seen at all measured steps, by one head
  for (const std::size_t step : steps) {
    std::size_t now = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      held.slots_min = std::min(held.slots_min, slots(head, step));
      held.slots_peak = std::max(held.slots_peak, slots(head, step));
      now += static_cast<std::size_t>(slots(head, step));
    }
    held.cache_peak = std::max(held.cache_peak, now * bytes.slot() + heads * bytes.per_head);
    total += now;
    tokens += static_cast<std::size_t>(result.step_token[step]) + 1;
  }
  const double mean = static_cast<double>(total) / static_cast<double>(steps.size());
  held.slots_mean = mean / static_cast<double>(heads);
  held.full_mean =
      static_cast<double>(tokens) / static_cast<double>(steps.size()) * static_cast<double>(heads * full_slot);
  held.cache_mean = mean * static_cast<double>(bytes.slot()) + static_cast<double>(heads * bytes.per_head);
  held.metadata_mean = mean * static_cast<double>(bytes.metadata) + static_cast<double>(heads * bytes.per_head);
  held.cache_final = heads * bytes.per_head;
  for (const int n : result.final_slots) held.cache_final += static_cast<std::size_t>(n) * bytes.slot();
  double sum = 0;
  std::size_t count = 0;
  for (std::size_t step = 0; step < all_steps; ++step)
    for (std::size_t head = 0; head < heads && result.step_token[step] >= header.prompt_tokens; ++head, ++count)
      sum += slots(head, step);
  if (count > 0) held.slots_decode_mean = sum / static_cast<double>(count);
  return held;
}

Row make_row(const Point& point, const TraceHeader& header, const std::string& status, const std::string& error) {
  Row row;
  row["run"] = point.run;
  row["status"] = status;
  row["error"] = error.empty() ? Row(nullptr) : Row(error);
  row["error.code"] = nullptr;
  for (const auto& [key, value] : point.values()) {
    row[key] = to_json(value);
    if (key == "trace") {
      row["trace.sha256"] = header.content_sha256;
      row["trace.dataset"] = header.dataset;
      row["trace.model"] = header.model_id;
    }
    if (key == "budget") {
      const int slots = std::min(point.settings.budget, header.tokens);
      row["budget_slots"] = slots > 0 ? Row(slots) : Row(nullptr);
    }
  }
  row["layers"] = Row::array();
  for (const LayerInfo& layer : header.layers) row["layers"].push_back(layer.index);
  return row;
}

void set_failed(Row& row, const std::string& error, int code) {
  row["status"] = "error";
  row["error"] = error;
  row["error.code"] = code;
}

void add_result(Row& row, const Point& point, const TraceHeader& header, const ReplayResult& result,
                const Metrics& metrics, const NoiseFloor& floor) {
  add_errors(row, metrics, floor);
  add_held(row, held_of(result, header, slot_bytes(header, *point.entry, point.policy->traits(), point.positions)));
  row["count.evictions"] = result.evictions;
  row["count.merges"] = result.merges;
  row["count.lost_in_folds"] = result.lost_in_folds;
  row["count.lost_by_clip"] = result.lost_by_clip;
  row["count.weights_outside"] = result.weights_outside;
  row["count.unbalanced"] = result.unbalanced;
  row["count.compressions"] = result.compressions;
  row["acted"] = result.evictions + result.merges > 0;
  row["leaks"] = result.leaks;
  add_multiplicities(row, result);
  if (point.entry->fold_note) add_notes(row, point.entry->fold_note, result.fold_notes);
  add_times(row, result);
  row["memory.process_peak_bytes"] = process_peak_bytes();
  row["memory.workspace_bytes"] = result.workspace_bytes;
}

void add_cost(Row& row, const RunCost& cost) {
  row["seconds"] = cost.seconds;
  row["threads"] = cost.threads;
  row["device"] = cost.device.empty() ? Row(nullptr) : Row(cost.device);
}

}  // namespace kv
