// Whether two engines' results of one point agree: to rounding, or to the bit. Written so that NaN never agrees.
#pragma once
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "core/metrics.hpp"
#include "core/replay.hpp"

namespace kv::test {

/// How a policy's points compare.
struct Agreement {
  int points = 0, impossible = 0;      // compared; refused by check_point
  std::size_t heads = 0;               // compared
  std::size_t undecided = 0;           // heads that differ no more than rounding moves the CPU's own
  std::vector<std::string> differing;  // heads that differ: a near tie of two scores, or a fault
  std::vector<std::string> faults;     // what no near tie explains
};

inline bool close(double a, double b, double relative, double absolute) {
  return std::abs(a - b) <= relative * std::abs(b) + absolute;
}

/// The sum of `count` numbers from `first` on.
inline double sum_of(const std::vector<double>& values, std::size_t first, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += values[first + i];
  return sum;
}

/// Compares one point's results: per head, and where all heads agree what mixes them. `nudge` gives the CPU's results
/// for inputs that are off by a rounding; it is called where a head differs beyond the usual limits, which then give way
/// as far as these results move.
class PointComparison {
 public:
  using Results = std::vector<ReplayResult>;
  PointComparison(std::string where, const ReplayResult& cpu, const ReplayResult& gpu, std::function<Results()> nudge,
                  Agreement& out)
      : where_(std::move(where)), cpu_(cpu), gpu_(gpu), nudge_(std::move(nudge)), out_(out) {}

  void run() {
    ++out_.points;
    if (!same_shape()) return fault("sizes differ");
    if (cpu_.slots != gpu_.slots) fault("slots per step differ");
    if (cpu_.leaks != gpu_.leaks) fault("leaks differs");
    std::vector<std::size_t> differing;
    for (std::size_t head = 0; head < cpu_.final_position.size(); ++head, ++out_.heads)
      if (!head_difference(head, {}).empty()) differing.push_back(head);
    if (!differing.empty()) return compare_nudged(differing);
    compare_counters();
    compare_wo();
    const double nmse = metrics_of(cpu_).nmse.value_or(NAN), theirs = metrics_of(gpu_).nmse.value_or(NAN);
    if (!close(theirs, nmse, relative, 1e-5)) fault(fmt::format("nmse {}, {}", nmse, theirs));
  }

 private:
  static constexpr double relative = 1e-3;  // of sums over a trace's queries
  static constexpr double reach = 4;        // engines may differ by so many times what the nudged results do

  void fault(const std::string& what) {
    constexpr std::size_t most = 3;  // of a point: the rest says the same
    if (++faults_ <= most) out_.faults.push_back(fmt::format("{}: {}", where_, what));
  }

  bool same_shape() const {
    const auto sizes = [](const ReplayResult& r) {
      return std::vector<std::size_t>{static_cast<std::size_t>(r.layers),
                                      static_cast<std::size_t>(r.query_heads),
                                      static_cast<std::size_t>(r.kv_heads),
                                      r.error2.size(),
                                      r.output2.size(),
                                      r.cosine.size(),
                                      r.lost_mass.size(),
                                      r.mass_tv.size(),
                                      r.wo_error2.size(),
                                      r.wo_output2.size(),
                                      r.slots.size(),
                                      r.final_slots.size(),
                                      r.final_position.size(),
                                      r.final_multiplicity.size()};
    };
    return sizes(cpu_) == sizes(gpu_) && cpu_.measured == gpu_.measured && cpu_.step_token == gpu_.step_token;
  }

  void compare_nudged(const std::vector<std::size_t>& heads) {
    const Results nudged = nudge_();
    for (const std::size_t head : heads) {
      const std::string difference = head_difference(head, nudged);
      if (difference.empty())
        ++out_.undecided;
      else
        out_.differing.push_back(fmt::format("{}, head {}: {}", where_, head, difference));
    }
  }

  /// What a result keeps of a KV head otherwise than the CPU.
  std::string slots_difference(const ReplayResult& other, std::size_t head) const {
    if (cpu_.final_position[head] != other.final_position[head]) return "it keeps other tokens";
    if (cpu_.final_multiplicity[head] != other.final_multiplicity[head]) return "tokens joined other slots";
    return cpu_.final_slots[head] != other.final_slots[head] ? "final slots" : "";
  }

  /// What differs of a KV head: what it keeps, else the sums of one of its query heads. A tie that went either way and
  /// was soon forgotten shows in the sums alone.
  std::string head_difference(std::size_t head, const Results& nudged) {
    const std::string slots = slots_difference(gpu_, head);
    const auto moves = [&](const ReplayResult& r) { return !slots_difference(r, head).empty(); };
    if (!slots.empty() && std::none_of(nudged.begin(), nudged.end(), moves)) return slots;
    const auto group = static_cast<std::size_t>(cpu_.query_heads / cpu_.kv_heads), queries = cpu_.measured.size();
    for (std::size_t query_head = head * group; query_head < (head + 1) * group; ++query_head) {
      const double output2 = sum_of(cpu_.output2, query_head * queries, queries);
      const double means = 2e-5 * static_cast<double>(queries);
      for (const auto& [name, field, absolute] : {std::tuple{"error2", &ReplayResult::error2, 1e-6 * output2},
                                                  {"output2", &ReplayResult::output2, 0.0},
                                                  {"cosine", &ReplayResult::cosine, means},
                                                  {"lost_mass", &ReplayResult::lost_mass, means},
                                                  {"mass_tv", &ReplayResult::mass_tv, means}}) {
        if ((cpu_.*field).empty()) continue;
        const auto sum = [&](const ReplayResult& r) { return sum_of(r.*field, query_head * queries, queries); };
        const double ours = sum(cpu_), theirs = sum(gpu_);
        double allowed = absolute;
        for (const ReplayResult& r : nudged) allowed = std::max(allowed, reach * std::abs(sum(r) - ours));
        if (!std::isfinite(theirs)) fault(fmt::format("{} of query head {}: {}, {}", name, query_head, ours, theirs));
        if (!close(theirs, ours, relative, allowed))
          return fmt::format("{} of query head {}: {}, {}", name, query_head, ours, theirs);
      }
    }
    return "";
  }

  void compare_counters() {
    const auto counts = [](const ReplayResult& r) {
      return std::vector<std::int64_t>{r.evictions,    r.merges,          r.compressions, r.lost_in_folds,
                                       r.lost_by_clip, r.weights_outside, r.unbalanced};
    };
    const auto text = [&](const ReplayResult& r) {
      std::string words;
      for (const std::int64_t n : counts(r)) words += fmt::format(" {}", n);
      return words;
    };
    if (counts(cpu_) != counts(gpu_)) fault(fmt::format("counters:{},{}", text(cpu_), text(gpu_)));
    const std::vector<double> a(cpu_.fold_notes.begin(), cpu_.fold_notes.end()),
        b(gpu_.fold_notes.begin(), gpu_.fold_notes.end());
    const auto count = static_cast<double>(a.size());
    if (!close(static_cast<double>(b.size()), count, 0.02, 0))  // 0/0 is no note, and what is hidden has no mass
      return fault(fmt::format("fold notes: {}, {}", a.size(), b.size()));
    for (const double p : {5.0, 50.0, 95.0})
      if (!a.empty() && !close(percentile(b, p).value_or(NAN), percentile(a, p).value_or(NAN), 1e-3, 1e-5))
        fault(fmt::format("fold notes differ at their percentile {}", p));
  }

  void compare_wo() {
    const std::size_t queries = cpu_.measured.size();
    for (std::size_t first = 0; first < cpu_.wo_error2.size(); first += queries) {
      const double error2 = sum_of(cpu_.wo_error2, first, queries), output2 = sum_of(cpu_.wo_output2, first, queries),
                   theirs = sum_of(gpu_.wo_error2, first, queries);
      if (!close(theirs, error2, relative, 1e-6 * output2) ||
          !close(sum_of(gpu_.wo_output2, first, queries), output2, 1e-3, 0))
        fault(fmt::format("wo_error2 of layer {}: {}, {}", first / queries, error2, theirs));
    }
  }

  std::string where_;
  const ReplayResult &cpu_, &gpu_;
  std::function<Results()> nudge_;
  Agreement& out_;
  std::size_t faults_ = 0;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// The first field in which two results differ by a bit; "" when none does. What was timed or allocated may differ.
inline std::string bit_difference(const ReplayResult& a, const ReplayResult& b) {
  for (const auto& [name, field] : {std::pair{"error2", &ReplayResult::error2},
                                    {"output2", &ReplayResult::output2},
                                    {"cosine", &ReplayResult::cosine},
                                    {"lost_mass", &ReplayResult::lost_mass},
                                    {"mass_tv", &ReplayResult::mass_tv},
                                    {"wo_error2", &ReplayResult::wo_error2},
                                    {"wo_output2", &ReplayResult::wo_output2}})
    if (!same_bits(a.*field, b.*field)) return name;
  if (a.measured != b.measured || a.step_token != b.step_token || a.slots != b.slots) return "slots";
  if (a.final_slots != b.final_slots || a.final_position != b.final_position) return "final_position";
  if (a.final_multiplicity != b.final_multiplicity) return "final_multiplicity";
  if (!same_bits(a.fold_notes, b.fold_notes)) return "fold_notes";
  const auto counts = [](const ReplayResult& r) {
    return std::vector<std::int64_t>{r.evictions,    r.merges,          r.compressions, r.lost_in_folds,
                                     r.lost_by_clip, r.weights_outside, r.unbalanced,   r.leaks};
  };
  return counts(a) == counts(b) ? "" : "counters";
}

}  // namespace kv::test
