// Random policies with random parameters over random shapes, against the invariants that hold for all of them.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <random>
#include <set>

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
    if (field.type == "choice")
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
  s.sink_logit = dice.between(0, 1) == 1, s.wo = dice.between(0, 2) == 0;
  return s;
}

void check(const test::Shape& shape, Session& session, Dice& dice) {
  const PolicyEntry& entry =
      policies()[static_cast<std::size_t>(dice.between(0, static_cast<int>(policies().size()) - 1))];
  const auto policy = entry.make();
  std::string label = entry.doc.name;
  for (const Field& field : policy->fields()) {
    field.set(dice.value_of(field));
    label += fmt::format(" {}={}", field.name, to_text(field.get()));
  }
  ReplaySettings s;
  s.budget = dice.between(1, shape.tokens + 5), s.block = {dice.one_of({0, 1, 5, 64})};
  s.compress = dice.one_of({Compress::prompt, Compress::always}),
  s.positions = dice.one_of({Positions::absolute, Positions::cache});
  s.measured = parse_measure("all", shape.tokens, shape.prompt_tokens);
  s.protect = {dice.one_of({0, 0, 3}), dice.one_of({0, 0, 4})};
  s.seed = static_cast<std::uint64_t>(dice.between(0, 9)), s.timing_repeats = dice.between(0, 5) == 0;
  SCOPED_TRACE(fmt::format("{} budget={} block={} {} {} protect={},{}", label, s.budget, name_of(s.block),
                           name_of(s.compress), name_of(s.positions), s.protect.sinks, s.protect.recent));
  const ReplayResult r = replay(session, entry, *policy, s);
  for (std::size_t h = 0; h < r.final_position.size(); ++h) {
    const auto& kept = r.final_position[h];
    ASSERT_EQ(std::set<std::int64_t>(kept.begin(), kept.end()).size(), static_cast<std::size_t>(r.final_slots[h]));
    ASSERT_TRUE(std::is_sorted(kept.begin(), kept.end()));
    ASSERT_TRUE(!policy->traits().compresses || s.compress == Compress::prompt || r.final_slots[h] <= s.budget);
  }
  for (std::size_t i = 0; i < r.error2.size(); ++i) {
    ASSERT_TRUE(r.error2[i] >= 0 && std::isfinite(r.error2[i]));
    ASSERT_TRUE(r.lost_mass[i] >= 0 && r.lost_mass[i] <= 1 + 1e-5) << r.lost_mass[i];
  }
  const bool over =
      policy->traits().compresses && (s.compress == Compress::always ? shape.tokens : shape.prompt_tokens) > s.budget;
  ASSERT_EQ(r.compressions > 0, over);
  ASSERT_TRUE(over || metrics_of(r).rel_l2.max.value_or(0) <= 1e-4);
}

TEST(SweepFuzz, TwoHundredRandomShapesHoldTheInvariants) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Dice dice(seed);
    const test::Shape shape = random_shape(dice);
    SCOPED_TRACE(fmt::format("seed {}: {} layers, {}x{} heads, d {} and {}, {} tokens, prompt {}, {}", seed,
                             shape.layers, shape.kv_heads, shape.group, shape.head_dim, shape.value_dim, shape.tokens,
                             shape.prompt_tokens, name_of(shape.dtype)));
    Session session(test::write_trace("fuzz", shape, seed));
    for (int point = 0; point < 4; ++point) check(shape, session, dice);
    std::filesystem::remove(session.header().file);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace kv
