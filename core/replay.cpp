#include "core/replay.hpp"

#include <fmt/core.h>
#include <tbb/parallel_for.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/allocation.hpp"
#include "core/comparison.hpp"
#include "core/error.hpp"
#include "core/head_replay.hpp"

namespace kv {
namespace {

/// Heads that must go in step: one KV head, or all of a layer when they share selections.
struct Unit {
  int layer;
  std::vector<int> heads;
};

std::vector<Unit> units_of(int first_layer, int last_layer, int kv_heads, bool together) {
  std::vector<Unit> units;
  std::vector<int> all(static_cast<std::size_t>(kv_heads));
  std::iota(all.begin(), all.end(), 0);
  for (int layer = first_layer; layer < last_layer; ++layer) {
    if (together)
      units.push_back({layer, all});
    else
      for (const int head : all) units.push_back({layer, {head}});
  }
  return units;
}

struct UnitOutcome {
  Counters counters;
  PhaseTimes prompt_times{};
  std::vector<PhaseTimes> decode_times;  // [decode step]
  std::vector<std::vector<int>> kept;    // [head] final tokens in order: what a timed pass must repeat
  std::size_t workspace_bytes = 0;
};

/// The heads of one layer that go in step, through the blocks of a trace.
class UnitReplay {
 public:
  UnitReplay(const LayerReplay& layer, const std::vector<int>& kv_heads) : layer_(layer) {
    heads_.reserve(kv_heads.size());
    for (const int h : kv_heads) heads_.emplace_back(layer, h);
  }

  UnitOutcome run() {
    const std::vector<BlockRange> blocks = blocks_of(layer_.trace, layer_.settings.block);
    for (std::size_t step = 0; step < blocks.size(); ++step) {
      compress_before(blocks[step]);
      for (HeadReplay& head : heads_) head.take(blocks[step], static_cast<int>(step));
      if (!probes()) compress(blocks[step]);
      add_times(blocks[step].phase);
    }
    for (HeadReplay& head : heads_) add_outcome(head);
    return std::move(out_);
  }

 private:
  const Traits& traits() const { return heads_.front().traits(); }
  bool probes() const { return traits().probe != Probe::none; }

  void probe(const BlockRange& block) {
    for (HeadReplay& head : heads_) head.probe(block);
  }

  void compress_before(const BlockRange& block) {
    if (!probes() || block.phase == Phase::decode || block.first == 0) return;
    const bool due = std::any_of(heads_.begin(), heads_.end(), [&](const HeadReplay& head) { return head.due(block); });
    if (due || traits().probe == Probe::always) probe(block);
    if (due) compress(block);
  }

  /// One compression of all heads that are due: one round, or as many as disjoint links take.
  void compress(const BlockRange& block) {
    std::vector<HeadReplay*> due;
    for (HeadReplay& head : heads_)
      if (head.due(block)) due.push_back(&head);
    const auto over = [&] {
      return std::any_of(due.begin(), due.end(), [](auto* head) { return head->over_budget(); });
    };
    for (bool more = !due.empty(); more;) {
      if (traits().scope == Scope::layer)
        compress_as_one(due, block);
      else
        compress_each(due, block);
      more = over();
      if (more && probes()) probe(block);
    }
    for (HeadReplay* head : due) head->count_compression();
  }

  void compress_as_one(const std::vector<HeadReplay*>& heads, const BlockRange& block) {
    Candidates sum = heads.front()->score(block);
    for (std::size_t h = 1; h < heads.size(); ++h) combine(sum, heads[h]->score(block));
    const std::vector<std::uint8_t> kept = choose(*heads.front(), sum);
    for (HeadReplay* head : heads) head->compress(sum, kept);
  }

  void compress_each(const std::vector<HeadReplay*>& heads, const BlockRange& block) {
    std::vector<Candidates> candidates;
    for (HeadReplay* head : heads) candidates.push_back(head->score(block));
    if (layer_.settings.allocation.kind == Allocation::Kind::adaptive && !allocated_) {
      const std::vector<int> budgets = head_budgets(layer_.settings.allocation, layer_.budget, candidates);
      for (std::size_t h = 0; h < heads.size(); ++h) heads[h]->set_budget(budgets[h]);
      allocated_ = true;
    }
    for (std::size_t h = 0; h < heads.size(); ++h)
      if (heads[h]->over_budget() || !traits().needs_budget())
        heads[h]->compress(candidates[h], choose(*heads[h], candidates[h]));
  }

  std::vector<std::uint8_t> choose(HeadReplay& head, const Candidates& candidates) {
    std::vector<std::uint8_t> kept;
    head.timed(TimedPhase::select, [&] {
      kept = traits().select == Select::links ? select_links(candidates, head.budget(), traits())
                                              : select(candidates, head.budget());
    });
    return kept;
  }

  void add_times(Phase phase) {
    if (phase == Phase::decode) out_.decode_times.emplace_back();
    PhaseTimes& times = phase == Phase::decode ? out_.decode_times.back() : out_.prompt_times;
    for (HeadReplay& head : heads_) {
      const PhaseTimes t = head.take_times();
      for (std::size_t p = 0; p < t.size(); ++p) times[p] += t[p];
    }
  }

  void add_outcome(HeadReplay& head) {
    const Counters& c = head.counters();
    Counters& sum = out_.counters;
    sum.evictions += c.evictions, sum.merges += c.merges, sum.compressions += c.compressions;
    sum.lost_in_folds += c.lost_in_folds, sum.lost_by_clip += c.lost_by_clip;
    sum.weights_outside += c.weights_outside, sum.unbalanced += c.unbalanced;
    sum.notes.insert(sum.notes.end(), c.notes.begin(), c.notes.end());
    out_.kept.push_back(head.kept_tokens());
    out_.workspace_bytes += head.workspace_bytes();
    if (layer_.full) head.finish();
  }

  const LayerReplay& layer_;
  std::vector<HeadReplay> heads_;
  bool allocated_ = false;
  UnitOutcome out_;
};

/// |W_o d|^2 and |W_o o|^2 of one layer's measured queries.
void measure_after_wo(const LayerReplay& layer, const std::vector<float>& deltas, ReplayResult& r) {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const ModelInfo& m = layer.trace.model;
  const auto count = static_cast<Eigen::Index>(r.measured.size());
  const Eigen::Index width = m.query_heads * m.value_dim;
  const Eigen::Map<const Rows> wo(layer.layer.tensors.wo.data(), m.hidden_size, width), d(deltas.data(), count, width);
  Rows full(count, width);  // [query heads][M][value_dim] -> [M][query heads * value_dim]
  for (Eigen::Index h = 0; h < m.query_heads; ++h)
    full.middleCols(h * m.value_dim, m.value_dim) =
        Eigen::Map<const Rows>(layer.full->output.data() + h * count * m.value_dim, count, m.value_dim);
  const Eigen::VectorXd error2 = (d * wo.transpose()).cast<double>().rowwise().squaredNorm();
  const Eigen::VectorXd output2 = (full * wo.transpose()).cast<double>().rowwise().squaredNorm();
  std::copy(error2.begin(), error2.end(), r.wo_error2.begin() + layer.index * count);
  std::copy(output2.begin(), output2.end(), r.wo_output2.begin() + layer.index * count);
}

/// One pass over all layers; without `measure` a timed pass, which writes nothing to `r`.
std::vector<UnitOutcome> run_all(Session& session, const PolicyEntry& entry, const BoundPolicy& policy,
                                 const ReplaySettings& settings, ReplayResult& r, bool measure) {
  const TraceHeader& trace = session.header();
  const auto has_wo = [&](int l) { return measure && trace.layers[static_cast<std::size_t>(l)].has_wo; };
  const int at_once = session.layers_at_once();
  const Traits traits = policy.traits();
  const std::vector<int> budgets = budgets_of(trace, traits, settings);
  std::vector<UnitOutcome> outcomes;
  for (int first = 0; first < r.layers; first += at_once) {
    const int last = std::min(first + at_once, r.layers);
    std::vector<std::shared_ptr<const PreparedLayer>> layers;
    std::vector<std::shared_ptr<const FullAttention>> full;
    std::vector<std::shared_ptr<const std::vector<float>>> norms;
    std::vector<std::vector<float>> deltas;
    std::vector<LayerReplay> shared;
    for (int l = first; l < last; ++l) {
      layers.push_back(session.layer(l));
      full.push_back(measure ? session.reference(l, settings.measured) : nullptr);
      norms.push_back(traits.output_norm ? session.norms(l) : nullptr);
      deltas.emplace_back(
          has_wo(l) ? r.measured.size() * static_cast<std::size_t>(r.query_heads * trace.model.value_dim) : 0);
    }
    for (int l = first; l < last; ++l) {
      const auto i = static_cast<std::size_t>(l - first);
      shared.push_back({trace, *layers[i], entry, policy, settings, full[i].get(), norms[i].get(), &r,
                        has_wo(l) ? deltas[i].data() : nullptr, l, budgets[static_cast<std::size_t>(l)]});
    }
    const bool together = traits.scope == Scope::layer || settings.allocation.kind == Allocation::Kind::adaptive;
    const std::vector<Unit> units = units_of(first, last, r.kv_heads, together);
    const std::size_t before = outcomes.size();
    outcomes.resize(before + units.size());
    const auto run = [&](std::size_t u) {
      outcomes[before + u] = UnitReplay(shared[static_cast<std::size_t>(units[u].layer - first)], units[u].heads).run();
    };
    if (measure)
      tbb::parallel_for(std::size_t{0}, units.size(), run, tbb::simple_partitioner{});
    else  // alone on the machine: timings do not share caches and bandwidth with another head's
      for (std::size_t u = 0; u < units.size(); ++u) run(u);
    for (std::size_t i = 0; i < shared.size(); ++i)
      if (shared[i].deltas) measure_after_wo(shared[i], deltas[i], r);
  }
  return outcomes;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Timed passes, each checked to keep exactly what the measured pass kept.
void time_replay(Session& session, const PolicyEntry& entry, const BoundPolicy& policy, const ReplaySettings& settings,
                 const std::vector<UnitOutcome>& checked, ReplayResult& r) {
  const auto steps = checked.front().decode_times.size(), repeats = static_cast<std::size_t>(settings.timing_repeats);
  std::vector<std::vector<std::vector<double>>> us(
      timed_phases, std::vector(steps, std::vector<double>(repeats)));                  // [phase][step][repeat]
  std::vector<std::vector<double>> prompt(timed_phases, std::vector<double>(repeats));  // [phase][repeat]
  for (std::size_t repeat = 0; repeat < repeats; ++repeat) {
    const std::vector<UnitOutcome> timed = run_all(session, entry, policy, settings, r, false);
    for (std::size_t u = 0; u < timed.size(); ++u) {
      KV_CHECK(timed[u].kept == checked[u].kept);
      for (std::size_t p = 0; p < us.size(); ++p) prompt[p][repeat] += timed[u].prompt_times[p] * 1e-3;
      for (std::size_t s = 0; s < steps; ++s)
        for (std::size_t p = 0; p < us.size(); ++p) us[p][s][repeat] += timed[u].decode_times[s][p] * 1e-3;
    }
  }
  add_times(r, us, prompt);
}

}  // namespace

std::vector<BlockRange> blocks_of(const TraceHeader& trace, Block block) {
  std::vector<BlockRange> blocks;
  const auto add = [&](int first, int last, Phase phase) {
    blocks.push_back({first, last, phase, static_cast<int>(blocks.size())});
  };
  const int size = block.tokens > 0 ? block.tokens : std::max(1, trace.prompt_tokens);
  for (int t = 0; t < trace.prompt_tokens; t += size) add(t, std::min(t + size, trace.prompt_tokens), Phase::prompt);
  for (int t = trace.prompt_tokens; t < trace.tokens; ++t) add(t, t + 1, Phase::decode);
  return blocks;
}

std::vector<int> budgets_of(const TraceHeader& trace, const Traits& traits, const ReplaySettings& settings) {
  return layer_budgets(settings.allocation, settings.budget, traits.observation_window,
                       trace.prompt_tokens > 0 ? trace.prompt_tokens : trace.tokens,
                       static_cast<int>(trace.layers.size()));
}

ReplayResult empty_result(const TraceHeader& trace, const ReplaySettings& settings) {
  ReplayResult r;
  r.layers = static_cast<int>(trace.layers.size()), r.query_heads = trace.model.query_heads,
  r.kv_heads = trace.model.kv_heads;
  r.measured = settings.measured;
  const auto heads = static_cast<std::size_t>(r.layers * r.kv_heads);
  const auto queries = static_cast<std::size_t>(r.layers * r.query_heads) * r.measured.size();
  for (auto* v : {&r.error2, &r.output2, &r.cosine, &r.lost_mass})
    v->assign(queries, std::numeric_limits<double>::quiet_NaN());
  if (settings.mass) r.mass_tv.assign(queries, std::numeric_limits<double>::quiet_NaN());
  if (std::any_of(trace.layers.begin(), trace.layers.end(), [](const LayerInfo& l) { return l.has_wo; }))
    for (auto* v : {&r.wo_error2, &r.wo_output2})
      v->assign(static_cast<std::size_t>(r.layers) * r.measured.size(), std::numeric_limits<double>::quiet_NaN());
  for (const BlockRange& block : blocks_of(trace, settings.block)) r.step_token.push_back(block.last - 1);
  r.slots.assign(heads * r.step_token.size(), 0);
  r.final_slots.assign(heads, 0);
  r.final_position.resize(heads), r.final_multiplicity.resize(heads);
  return r;
}

bool sees_measured_queries_early(const TraceHeader& trace, const Traits& traits, const ReplaySettings& settings) {
  const auto measured_in = [&](const BlockRange& block) {
    const auto at = std::lower_bound(settings.measured.begin(), settings.measured.end(), block.first);
    return at != settings.measured.end() && *at < block.last;
  };
  const std::vector<BlockRange> blocks = blocks_of(trace, settings.block);
  return traits.future_mass ||
         (traits.probe != Probe::none && std::any_of(blocks.begin(), blocks.end(), [&](const auto& b) {
            return b.phase == Phase::prompt && b.first > 0 && measured_in(b);
          }));
}

void add_times(ReplayResult& result, const std::vector<std::vector<std::vector<double>>>& us,
               const std::vector<std::vector<double>>& prompt) {
  const std::size_t repeats = prompt.front().size();
  std::vector<double> totals(repeats);
  for (const auto& phase : us) {
    result.us.emplace_back();
    for (const auto& step : phase) {
      result.us.back().push_back(median(step));
      for (std::size_t repeat = 0; repeat < repeats; ++repeat) totals[repeat] += step[repeat];
    }
  }
  for (const auto& phase : prompt) result.prompt_us.push_back(median(phase));
  const auto [low, high] = std::minmax_element(totals.begin(), totals.end());
  result.timing_noise = repeats > 1 ? (*high - *low) / median(totals) : std::numeric_limits<double>::quiet_NaN();
}

SlotBytes slot_bytes(const TraceHeader& trace, const PolicyEntry& policy, const Traits& traits, Positions positions) {
  SlotBytes bytes;
  bytes.payload = static_cast<std::size_t>(trace.model.head_dim + trace.model.value_dim) * size_of(trace.dtype);
  const bool counts = (policy.biases && traits.merges) || positions == Positions::span;  // multiplicities are in use
  bytes.metadata = 4 + (traits.keeps_state ? policy.slot_state_bytes : 0) + (counts ? 4 : 0);  // position, state, count
  bytes.per_head = policy.head_state_bytes;
  return bytes;
}

ReplayResult replay(Session& session, const PolicyEntry& entry, const BoundPolicy& policy,
                    const ReplaySettings& settings) {
  const TraceHeader& trace = session.header();
  check_point(trace, entry, policy, settings);
  ReplayResult r = empty_result(trace, settings);
  const std::vector<UnitOutcome> outcomes = run_all(session, entry, policy, settings, r, true);
  for (const UnitOutcome& unit : outcomes) {
    r.evictions += unit.counters.evictions, r.merges += unit.counters.merges;
    r.lost_in_folds += unit.counters.lost_in_folds, r.compressions += unit.counters.compressions;
    r.lost_by_clip += unit.counters.lost_by_clip, r.weights_outside += unit.counters.weights_outside;
    r.unbalanced += unit.counters.unbalanced;
    r.fold_notes.insert(r.fold_notes.end(), unit.counters.notes.begin(), unit.counters.notes.end());
    r.workspace_bytes = std::max(r.workspace_bytes, unit.workspace_bytes);
  }
  r.leaks = r.compressions > 0 && sees_measured_queries_early(trace, policy.traits(), settings);
  if (settings.timing_repeats > 0) time_replay(session, entry, policy, settings, outcomes, r);
  return r;
}

ReplayResult noise_floor(Session& session, const std::vector<int>& measured) {
  const TraceHeader& trace = session.header();
  ReplaySettings settings;
  settings.measured = measured;
  ReplayResult r = empty_result(trace, settings);
  const auto dv = static_cast<std::size_t>(trace.model.value_dim);
  for (int l = 0; l < r.layers; ++l) {
    if (!trace.layers[static_cast<std::size_t>(l)].has_o)
      throw TraceError(fmt::format("{}: {}/o is not recorded: no noise floor", trace.file.string(),
                                   trace.layers[static_cast<std::size_t>(l)].path));
    const auto layer = session.layer(l);
    const auto full = session.reference(l, measured);
    const std::size_t rows = layer->tensors.o.size() / dv / static_cast<std::size_t>(r.query_heads);
    for (std::size_t h = 0; h < static_cast<std::size_t>(r.query_heads); ++h)
      for (std::size_t i = 0; i < measured.size(); ++i) {
        const auto row = static_cast<std::size_t>(layer->row_of_token[static_cast<std::size_t>(measured[i])]);
        const Comparison c(full->output.data() + (h * measured.size() + i) * dv,
                           layer->tensors.o.data() + (h * rows + row) * dv, trace.model.value_dim);
        const std::size_t at = (static_cast<std::size_t>(l * r.query_heads) + h) * measured.size() + i;
        r.error2[at] = c.error2, r.output2[at] = c.output2, r.cosine[at] = c.cosine;
      }
  }
  return r;
}

}  // namespace kv
