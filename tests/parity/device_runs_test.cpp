// What replay_on_device promises beside its numbers: the same bits again, points that do not touch each other, errors
// that stay with their point, and an end when told. Skipped without a device.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <string_view>

#include "tests/parity/cases.hpp"
#include "tests/parity/made_trace.hpp"

namespace kv::test {
namespace {

constexpr Shape shape{.group = 3,
                      .head_dim = 64,
                      .value_dim = 64,
                      .tokens = 200,
                      .prompt_tokens = 150,
                      .window = 60,
                      .softcap = 20,
                      .sink_logit = true,
                      .wo = true,
                      .e = true};

class DeviceRuns : public testing::Test {
 protected:
  void SetUp() override {
    if (devices().empty()) GTEST_SKIP() << "no CUDA device: " << why_no_device();
  }

  /// Every policy at two budgets, compressing always where it can.
  static std::vector<Case> catalogue(const TraceHeader& trace) {
    std::vector<Case> cases;
    for (const PolicyEntry& entry : policies())
      for (const char* budget : {"10%", "40%"}) {
        ReplaySettings settings;
        settings.block = {64}, settings.seed = 7, settings.mass = true;
        const auto all = parse_measure("all", trace.tokens, trace.prompt_tokens);
        settings.measured = recorded_queries(trace, all);
        for (const Compress compress : {Compress::always, Compress::prompt}) {
          settings.compress = compress;
          Case c = make_case(trace, entry, {}, budget, settings, "");
          if (!possible(trace, c)) continue;
          cases.push_back(std::move(c));
          break;
        }
      }
    return cases;
  }
};

TEST_F(DeviceRuns, RepeatToTheBit) {
  MadeTrace trace("repeat", shape, 1);
  const std::vector<Case> cases = catalogue(trace.session().header());
  const auto once = replay_together(trace.session(), cases), again = replay_together(trace.session(), cases);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    EXPECT_EQ(error_of(once[i]), "") << cases[i].name;
    EXPECT_EQ(bit_difference(once[i].result, again[i].result), "") << cases[i].name;
    EXPECT_TRUE(once[i].seconds > 0 && once[i].seconds < 1e6) << cases[i].name;
  }
}

TEST_F(DeviceRuns, TogetherAndAloneGiveTheSameBits) {
  MadeTrace trace("alone", shape, 2);
  const std::vector<Case> cases = catalogue(trace.session().header());
  const auto together = replay_together(trace.session(), cases);
  const std::vector<Case> backwards(cases.rbegin(), cases.rend());
  const auto reversed = replay_together(trace.session(), backwards);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const auto alone = replay_together(trace.session(), {cases[i]});
    EXPECT_EQ(bit_difference(together[i].result, alone[0].result), "") << cases[i].name << ": alone";
    EXPECT_EQ(bit_difference(together[i].result, reversed[cases.size() - 1 - i].result), "")
        << cases[i].name << ": in another order";
  }
}

/// One layer at a time: what each is said to take at most is some 65 MiB.
TEST_F(DeviceRuns, WithLittleMemoryTheBitsAreTheSame) {
  Shape deep = shape;
  deep.layers = 4;
  MadeTrace trace("memory", deep, 3);
  const std::vector<Case> cases = catalogue(trace.session().header());
  const auto roomy = replay_together(trace.session(), cases),
             narrow = replay_together(trace.session(), cases, {std::size_t{80} << 20});
  for (std::size_t i = 0; i < cases.size(); ++i) {
    EXPECT_EQ(error_of(narrow[i]), "") << cases[i].name;
    EXPECT_EQ(bit_difference(roomy[i].result, narrow[i].result), "") << cases[i].name;
  }
}

TEST_F(DeviceRuns, WithTooLittleMemoryPointsSayWhatToChange) {
  MadeTrace trace("tiny", shape, 3);
  const std::vector<Case> cases = catalogue(trace.session().header());
  for (const DeviceOutcome& outcome : replay_together(trace.session(), cases, {std::size_t{1} << 20})) {
    const std::string error = error_of(outcome);
    EXPECT_NE(error.find("CudaError"), std::string::npos) << error;
    EXPECT_NE(error.find("1.0 MiB may be used: lower the budget or replay.block, or give more with --device-memory"),
              std::string::npos)
        << error;
  }
}

/// The points that fit run, whatever else was asked for.
TEST_F(DeviceRuns, WhatDoesNotFitTakesNothingAlong) {
  Shape wide = shape;
  wide.tokens = 20000, wide.prompt_tokens = 19900, wide.wo = wide.e = false, wide.group = 1;
  MadeTrace trace("partly", wide, 3);
  std::vector<Case> cases;
  for (const char* budget : {"100", "90%", "200"}) {
    ReplaySettings settings;
    settings.block = {64}, settings.measured = parse_measure("last:10", wide.tokens, wide.prompt_tokens);
    cases.push_back(make_case(trace.session().header(), find_policy("streaming_llm"), {}, budget, settings, ""));
  }
  const std::string error = error_of(replay_together(trace.session(), {cases[1]}, {std::size_t{1} << 20})[0]);
  const std::string_view before = "this point take ";
  ASSERT_NE(error.find(before), std::string::npos) << error;
  const double needed = std::stod(error.substr(error.find(before) + before.size()));  // MiB
  const auto roomy = replay_together(trace.session(), cases),
             narrow = replay_together(trace.session(), cases, {static_cast<std::size_t>((needed - 1) * 1048576)});
  EXPECT_EQ(error_of(roomy[1]), "");
  EXPECT_NE(error_of(narrow[1]).find("--device-memory"), std::string::npos) << error_of(narrow[1]);
  for (const std::size_t i : {0u, 2u}) {
    EXPECT_EQ(error_of(narrow[i]), "");
    EXPECT_EQ(bit_difference(roomy[i].result, narrow[i].result), "");
  }
}

/// A budget of nothing is refused when a config is read (test_backend.py); the engines do not take it either.
TEST_F(DeviceRuns, ABudgetOfNothingIsTheSameErrorOnBothEngines) {
  MadeTrace trace("nothing", shape, 3);
  std::vector<Case> cases = catalogue(trace.session().header());
  for (Case& c : cases) c.settings.budget = 0;
  const auto outcomes = replay_together(trace.session(), cases);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    EXPECT_NE(error_of(outcomes[i]), "") << cases[i].name;
    EXPECT_EQ(error_of(outcomes[i]), error_of(replay_on_cpu(trace.session(), cases[i]))) << cases[i].name;
  }
}

/// `replay.precision: fast` rounds outputs of prompt blocks; what is kept, and what is measured of single tokens, stays.
TEST_F(DeviceRuns, FastChangesTheOutputsOfPromptBlocksAlone) {
  MadeTrace trace("fast", shape, 9);
  const TraceHeader& header = trace.session().header();
  std::vector<Case> cases = catalogue(header);
  const auto exact = replay_together(trace.session(), cases);
  for (Case& c : cases) c.settings.precision = Precision::fast;
  const auto fast = replay_together(trace.session(), cases);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(cases[i].name);
    ASSERT_EQ(error_of(fast[i]), "");
    const ReplayResult &a = exact[i].result, &b = fast[i].result;
    EXPECT_TRUE(a.final_position == b.final_position && a.final_multiplicity == b.final_multiplicity);
    EXPECT_TRUE(same_bits(a.lost_mass, b.lost_mass));
    EXPECT_FALSE(same_bits(a.error2, b.error2)) << "a switch that changes something";
    EXPECT_NEAR(*metrics_of(a).nmse, *metrics_of(b).nmse, 4e-3);
    const std::size_t queries = a.measured.size();
    for (std::size_t q = 0; q < a.error2.size(); ++q)
      if (a.measured[q % queries] >= header.prompt_tokens) {
        ASSERT_EQ(a.error2[q], b.error2[q]) << q;
      }
  }
}

TEST_F(DeviceRuns, NoiseFloorsAreTheCpuEngines) {
  Shape deep = shape;
  deep.layers = 5;
  MadeTrace trace("floor", deep, 9, [](int layer, LayerTensors& t) {
    t.o = t.q;  // values and queries are of one size
    for (float& x : t.o) x += static_cast<float>(layer);
  });
  const TraceHeader& header = trace.session().header();
  std::vector<Case> cases = catalogue(header);
  cases.front().settings.measured = parse_measure("last:7", header.tokens, header.prompt_tokens);
  for (const std::size_t memory : {std::size_t{0}, std::size_t{80} << 20}) {
    const auto outcomes = replay_together(trace.session(), cases, {memory});
    for (const std::size_t i : {std::size_t{0}, std::size_t{1}}) {
      ASSERT_TRUE(outcomes[i].floor);
      const ReplayResult cpu = noise_floor(trace.session(), cases[i].settings.measured), &device = *outcomes[i].floor;
      ASSERT_EQ(device.error2.size(), cpu.error2.size());
      for (std::size_t j = 0; j < cpu.error2.size(); ++j) {
        EXPECT_NEAR(device.error2[j], cpu.error2[j], 1e-3 * cpu.error2[j]) << j;
        EXPECT_NEAR(device.output2[j], cpu.output2[j], 1e-3 * cpu.output2[j]) << j;
        EXPECT_NEAR(device.cosine[j], cpu.cosine[j], 1e-4) << j;
      }
    }
  }
}

TEST_F(DeviceRuns, AnErrorStaysWithItsPoint) {
  MadeTrace trace("errors", shape, 4);
  std::vector<Case> cases = catalogue(trace.session().header());
  const auto expected = replay_together(trace.session(), cases);
  Case refused = cases[1];  // what check_point throws
  refused.entry = &find_policy("expected_attention"), refused.policy = refused.entry->make();
  refused.settings.positions = Positions::cache;
  cases.insert(cases.begin() + 3, refused);
  auto outcomes = replay_together(trace.session(), cases);
  EXPECT_EQ(error_of(outcomes[3]), error_of(replay_on_cpu(trace.session(), refused)));
  EXPECT_NE(error_of(outcomes[3]).find("only 'absolute' is possible"), std::string::npos);
  outcomes.erase(outcomes.begin() + 3);
  for (std::size_t i = 0; i < outcomes.size(); ++i)
    EXPECT_EQ(bit_difference(expected[i].result, outcomes[i].result), "") << i;
}

/// A prompt query whose logits overflow: who observes it has scores that are not numbers, the others go on. Measured, it
/// is an error of every point.
TEST_F(DeviceRuns, OverflowsAreErrorsOfTheSamePointsOnBothEngines) {
  Shape large = shape;
  large.dtype = Dtype::float32, large.softcap = 0;
  MadeTrace trace("overflow", large, 5, [](int layer, LayerTensors& t) {
    if (layer == 1) std::fill_n(t.q.begin() + 30 * 64, 64, 3e38f);  // of token 30, in the first query head
  });
  const TraceHeader& header = trace.session().header();
  std::vector<Case> cases = catalogue(header);
  for (Case& c : cases) {
    c.settings.measured = parse_measure("decode", header.tokens, header.prompt_tokens);
    if (c.policy->traits().probe != Probe::none)
      c.settings.block = {12};  // so that the query is among those that probe
  }
  cases.push_back(cases.front());
  cases.back().settings.measured = parse_measure("all", header.tokens, header.prompt_tokens);
  const auto outcomes = replay_together(trace.session(), cases);
  int failed = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const DeviceOutcome cpu = replay_on_cpu(trace.session(), cases[i]);
    const std::string ours = error_of(cpu), theirs = error_of(outcomes[i]);
    EXPECT_EQ(kind_of(ours), kind_of(theirs)) << cases[i].name << ": " << ours << "; " << theirs;
    if (ours.empty()) continue;
    EXPECT_NE(theirs.find("layer 3"), std::string::npos) << theirs;
    ++failed;
  }
  EXPECT_GT(failed, 3);
  EXPECT_LT(failed, static_cast<int>(cases.size()) / 2);
}

TEST_F(DeviceRuns, EndWhenTold) {
  MadeTrace trace("stop", shape, 6);
  const std::vector<Case> cases = catalogue(trace.session().header());
  const auto expected = replay_together(trace.session(), cases);
  std::vector<DevicePoint> points;
  for (const Case& c : cases) points.push_back({c.entry, c.policy.get(), &c.settings});
  std::vector<int> calls(cases.size(), 0);
  replay_on_device(trace.session(), points, {}, [&](std::size_t i, DeviceOutcome outcome) {
    ++calls.at(i);
    EXPECT_EQ(bit_difference(expected[i].result, outcome.result), "");
    return false;
  });
  EXPECT_EQ(*std::max_element(calls.begin(), calls.end()), 1) << "the first was reported, none twice";
  replay_on_device(trace.session(), {}, {}, [](std::size_t, DeviceOutcome) {
    ADD_FAILURE() << "no points, no reports";
    return true;
  });
}

/// A trace that recorded the queries from token `first` on only.
std::filesystem::path write_late_queries(const Shape& s, int first) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("kvreplay-late-{}.h5", getpid());
  TraceWriter writer(path, header_of(s));
  LayerInfo info;
  for (int token = first; token < s.tokens; ++token) info.q_index.push_back(token);
  LayerTensors t = tensors_of(s, info, 8);
  for (auto* rows : {&t.q, &t.e}) {
    const std::size_t row = static_cast<std::size_t>(s.head_dim), all = static_cast<std::size_t>(s.tokens) * row;
    std::vector<float> late;
    for (std::size_t head = 0; head < rows->size(); head += all)
      late.insert(late.end(), rows->begin() + static_cast<std::ptrdiff_t>(head + static_cast<std::size_t>(first) * row),
                  rows->begin() + static_cast<std::ptrdiff_t>(head + all));
    *rows = late;
  }
  writer.write_layer(info, t);
  writer.close();
  return path;
}

TEST_F(DeviceRuns, AgreeWhereQueriesWereNotRecorded) {
  const auto path = write_late_queries(shape, 100);
  Session session(path);
  std::vector<Case> cases = catalogue(session.header());
  for (Case& c : cases) c.settings.measured = parse_measure("decode", shape.tokens, shape.prompt_tokens);
  Agreements out;
  compare_engines(session, cases, out);
  std::filesystem::remove(path);
  EXPECT_GT(out.size(), 5u);
  for (const auto& [policy, agreement] : out) {
    SCOPED_TRACE(policy);
    expect_agreement(agreement, 2);
  }
}

/// Prompts of nothing and of everything, one token, values of another size than keys.
TEST_F(DeviceRuns, AgreeOnTracesAtTheEdges) {
  Agreements out;
  const auto add = [&](int tokens, int prompt, int key_dim, int value_dim, const char* measure) {
    Shape s = shape;
    s.tokens = tokens, s.prompt_tokens = prompt, s.head_dim = key_dim, s.value_dim = value_dim;
    MadeTrace trace(fmt::format("edges-{}-{}-{}", tokens, prompt, value_dim), s, 7);
    std::vector<Case> cases = catalogue(trace.session().header());
    for (Case& c : cases) c.settings.measured = parse_measure(measure, tokens, prompt);
    compare_engines(trace.session(), cases, out);
  };
  add(90, 0, 64, 64, "all");
  add(90, 90, 64, 64, "prompt");
  add(1, 1, 64, 64, "all");
  add(2, 1, 128, 128, "all");
  add(90, 60, 64, 128, "last:3");
  add(90, 60, 96, 64, "all");
  for (const auto& [policy, agreement] : out) {
    SCOPED_TRACE(policy);
    expect_agreement(agreement, 2);
  }
}

/// A prompt of 128k tokens in one block, its last queries recorded: the long end that a replay must reach.
TEST_F(DeviceRuns, AgreeOn128kTokens) {
  const Shape longest{.layers = 1,
                      .kv_heads = 1,
                      .group = 4,
                      .head_dim = 128,
                      .value_dim = 128,
                      .tokens = 1 << 17,
                      .prompt_tokens = (1 << 17) - 16};
  const auto path = write_late_queries(longest, longest.tokens - 64);
  Session session(path);
  const TraceHeader& trace = session.header();
  std::vector<Case> cases;
  for (const char* policy : {"snapkv", "streaming_llm"}) {
    const PolicyEntry& entry = find_policy(policy);
    ReplaySettings settings;
    settings.compress = entry.published.compress, settings.positions = entry.published.positions;
    settings.measured = parse_measure("last:16", trace.tokens, trace.prompt_tokens);
    cases.push_back(make_case(trace, entry, {}, "4096", settings, "128k"));
  }
  const auto outcomes = replay_together(session, cases);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(cases[i].name);
    ASSERT_EQ(error_of(outcomes[i]), "");
    const ReplayResult cpu = replay(session, cases[i]), &gpu = outcomes[i].result;
    const auto &ours = cpu.final_position.at(0), &theirs = gpu.final_position.at(0);
    const std::size_t grown = cases[i].settings.compress == Compress::prompt ? 16 : 0;
    EXPECT_EQ(theirs.size(), 4096 + grown);
    EXPECT_EQ(gpu.slots, cpu.slots);
    std::vector<std::int64_t> apart;
    std::ranges::set_symmetric_difference(ours, theirs, std::back_inserter(apart));
    EXPECT_LE(apart.size(), 4u) << "of 4096 slots a near tie or two";
    EXPECT_TRUE(close(*metrics_of(gpu).nmse, *metrics_of(cpu).nmse, 1e-3, 1e-5))
        << *metrics_of(cpu).nmse << ", " << *metrics_of(gpu).nmse;
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace kv::test
