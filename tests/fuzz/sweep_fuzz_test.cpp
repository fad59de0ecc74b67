// Random policies with random parameters over random shapes, against the invariants that hold for all of them.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <numeric>
#include <random>
#include <set>

#include "core/error.hpp"
#include "core/metrics.hpp"
#include "tests/synthetic.hpp"

namespace kv {
namespace {

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : random_(seed) {}
  int between(int low, int high) {
    return low + static_cast<int>(random_() % static_cast<std::uint64_t>(high - low + 1));
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int>(values.size()) - 1)];
  }
  Value value_of(const Field& field) {
    if (field.type == "bool") return between(0, 1) == 1;
    if (!field.choices.empty() && (field.type == "choice" || between(0, 1) == 1))  // a number may also be a word
      return field.choices[static_cast<std::size_t>(between(0, static_cast<int>(field.choices.size()) - 1))];
    if (field.type == "int")
      return std::int64_t{between(static_cast<int>(field.low), static_cast<int>(std::min(field.high, field.low + 20)))};
    return field.low + (field.high - field.low) * between(0, 100) / 100.0;
  }

 private:
  std::mt19937_64 random_;
};

test::Shape random_shape(Dice& dice) {
  test::Shape s;
  s.layers = dice.between(1, 3), s.kv_heads = dice.between(1, 3), s.group = dice.one_of({1, 2, 3, 4, 8});
  s.head_dim = 2 * dice.between(1, 20), s.value_dim = dice.between(1, 24);
  s.tokens = dice.between(1, 90), s.prompt_tokens = dice.between(0, s.tokens);
  s.dtype = dice.one_of({Dtype::float16, Dtype::bfloat16, Dtype::float32});
  s.rope = dice.between(0, 3) > 0, s.style = dice.one_of({RopeStyle::half, RopeStyle::interleaved});
  s.window = dice.one_of({0, 1, 7, 30}), s.softcap = dice.one_of({0.0, 30.0});
  s.sink_logit = dice.between(0, 1) == 1, s.wo = dice.between(0, 2) > 0, s.e = dice.between(0, 2) > 0;
  return s;
}

/// False when the trace lacks what the policy needs, or the policy cannot do this: a ConfigError before anything runs.
bool possible(const Session& session, const PolicyEntry& entry, const BoundPolicy& policy, const ReplaySettings& s) {
  try {
    check_point(session.header(), entry, policy, s);
    return true;
  } catch (const ConfigError&) {
    return false;
  }
}

/// Every query's error is at most 1e-4 of its output, and where the output nearly cancels (value_dim 1), 1e-6 of the
/// typical one.
void expect_identity(const ReplayResult& r) {
  EXPECT_LE(metrics_of(r).nmse.value_or(0), 2e-6);
  const double typical =
      std::accumulate(r.output2.begin(), r.output2.end(), 0.0) / static_cast<double>(r.output2.size());
  for (std::size_t i = 0; i < r.error2.size(); ++i)
    EXPECT_LE(std::sqrt(r.error2[i]), std::max(1e-4 * std::sqrt(r.output2[i]), 1e-6 * std::sqrt(typical)));
}

/// Runs one random point; false when it was impossible.
bool ran(const test::Shape& shape, Session& session, Dice& dice) {
  const PolicyEntry& entry =
      policies()[static_cast<std::size_t>(dice.between(0, static_cast<int>(policies().size()) - 1))];
  const auto policy = entry.make();
  std::string label = entry.doc.name;
  for (const Field& field : policy->fields()) {
    field.set(field.name == "guard" ? Value("clamp") : dice.value_of(field));  // unguarded weights may overflow
    label += fmt::format(" {}={}", field.name, to_text(field.get()));
  }
  ReplaySettings s;
  const Traits traits = policy->traits();
  s.budget = traits.needs_budget() ? dice.between(1, shape.tokens + 5) : shape.tokens,
  s.block = {dice.one_of({0, 1, 5, 64})};
  s.compress = dice.one_of({Compress::prompt, Compress::always}),
  s.positions = dice.one_of({Positions::absolute, Positions::cache, Positions::span});
  const bool uniform = dice.between(0, 3) > 0;
  if (!uniform) s.allocation.kind = dice.one_of({Allocation::Kind::pyramid, Allocation::Kind::adaptive});
  if (traits.probe != Probe::none) s.compress = Compress::prompt;
  s.measured = parse_measure("all", shape.tokens, shape.prompt_tokens);
  s.protect = {dice.one_of({0, 0, 3}), dice.one_of({0, 0, 4})};
  s.seed = static_cast<std::uint64_t>(dice.between(0, 9)), s.timing_repeats = dice.between(0, 5) == 0;
  SCOPED_TRACE(fmt::format("{} budget={} block={} {} {} protect={},{}", label, s.budget, name_of(s.block),
                           name_of(s.compress), name_of(s.positions), s.protect.sinks, s.protect.recent));
  if (!possible(session, entry, *policy, s)) return false;
  const ReplayResult r = replay(session, entry, *policy, s);
  const bool plain = traits.needs_budget() && traits.interval == 1 && traits.probe == Probe::none && uniform;
  for (std::size_t h = 0; h < r.final_position.size(); ++h) {
    const auto& kept = r.final_position[h];
    EXPECT_EQ(std::set<std::int64_t>(kept.begin(), kept.end()).size(), static_cast<std::size_t>(r.final_slots[h]));
    EXPECT_TRUE(std::is_sorted(kept.begin(), kept.end()));
    EXPECT_TRUE(!plain || s.compress == Compress::prompt || r.final_slots[h] <= s.budget);
  }
  for (std::size_t i = 0; i < r.error2.size(); ++i) {
    EXPECT_TRUE(r.error2[i] >= 0 && std::isfinite(r.error2[i]));
    EXPECT_TRUE(r.lost_mass[i] >= 0 && r.lost_mass[i] <= 1 + 1e-5) << r.lost_mass[i];
  }
  const bool over = (s.compress == Compress::always ? shape.tokens : shape.prompt_tokens) > s.budget;
  EXPECT_TRUE(!plain || (r.compressions > 0) == over);
  if (r.evictions + r.merges == 0) expect_identity(r);
  return true;
}

TEST(SweepFuzz, TwoHundredRandomShapesHoldTheInvariants) {
  int points = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Dice dice(seed);
    const test::Shape shape = random_shape(dice);
    SCOPED_TRACE(fmt::format("seed {}: {} layers, {}x{} heads, d {} and {}, {} tokens, prompt {}, {}", seed,
                             shape.layers, shape.kv_heads, shape.group, shape.head_dim, shape.value_dim, shape.tokens,
                             shape.prompt_tokens, name_of(shape.dtype)));
    Session session(test::write_trace("fuzz", shape, seed));
    for (int point = 0; point < 6; ++point) points += ran(shape, session, dice);
    std::filesystem::remove(session.header().file);
    if (testing::Test::HasFailure()) return;
  }
  EXPECT_GT(points, 800) << "most of what is drawn can run";
}

}  // namespace
}  // namespace kv
