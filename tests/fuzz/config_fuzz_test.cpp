// Mutated configs: a ConfigError (or the CudaError of `backend: cuda`) or success, nothing else.
#include <gtest/gtest.h>

#include <random>

#include "core/error.hpp"
#include "experiments/point.hpp"

namespace kv {
namespace {

constexpr const char* sample = R"(# a bit of everything
trace: [a.h5, b.h5]
backend: auto
seed: 0
protect: {sinks: 4, recent: 8}
sweep:
  - policy: full
  - policy: [random, streaming_llm, h2o, {name: snapkv, window: [16, 32]}]
    replay: {compress: [prompt, always], block: 128, measure: 'last:32'}
    budget: [6.25%, 0.125, 25%, 64, 1MiB]
  - policy: {name: snapkv, window: &w [16, 32]}
    zip: {budget: [12.5%, 25%], policy.kernel: [5, 7]}
    series: true
  - {policy: weighted_kv, policy.managed: 0.5, budget: 1.0, timing.repeats: 3}
)";

const std::vector<std::string> pieces{"[",
                                      "]",
                                      "{",
                                      "}",
                                      ":",
                                      ": ",
                                      "- ",
                                      "\n",
                                      "  ",
                                      "'",
                                      "\"",
                                      "&w ",
                                      "*w",
                                      "#",
                                      "%",
                                      "|",
                                      ">",
                                      "~",
                                      "null",
                                      "policy",
                                      "name",
                                      "sweep",
                                      "zip",
                                      "-1",
                                      "1e308",
                                      "nan",
                                      ".inf",
                                      "0x1F",
                                      "!!binary ",
                                      "? ",
                                      "---\n",
                                      "<<: ",
                                      "\t",
                                      "\x01",
                                      "\xff\xfe",
                                      "h2o",
                                      "99999999999999999999",
                                      ",",
                                      "policy."};

std::string mutate(std::string text, std::mt19937& random) {
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  for (std::size_t n = 1 + below(2); n > 0 && !text.empty(); --n) {
    const std::size_t at = below(text.size()), length = 1 + below(8);
    switch (below(4)) {
      case 0:
        text.erase(at, length);
        break;
      case 1:
        text.insert(at, pieces[below(pieces.size())]);
        break;
      case 2:
        text[at] = static_cast<char>(below(256));
        break;
      default:
        text.insert(at, text.substr(below(text.size()), 4 * length));
    }
  }
  return text;
}

TEST(ConfigFuzz, MutatedConfigsAreErrorsOrSweeps) {
  int good = 0;
  constexpr int cases = 300;
  for (unsigned seed = 0; seed < cases; ++seed) {
    std::mt19937 random(seed);
    const std::string text = mutate(sample, random);
    try {
      const auto points = resolve(expand(parse_config(text, "fuzz.yaml", {})));
      for (const Point& point : points) EXPECT_FALSE(canonical(point, "").empty());
      ++good;
    } catch (const ConfigError& error) {
      EXPECT_EQ(std::string(error.what()).rfind("fuzz.yaml", 0), 0u) << "seed " << seed << ": " << error.what();
    } catch (const CudaError&) {
    } catch (const std::exception& error) {
      ADD_FAILURE() << "seed " << seed << ": " << error.what() << "\n" << text;
    }
  }
  EXPECT_GT(good, 5) << "mutations that leave some configs whole test more than the parser";
  EXPECT_LT(good, cases * 19 / 20);
}

TEST(ConfigFuzz, MutatedOverridesAreErrorsOrSweeps) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const std::string text = mutate("policy={name: snapkv, window: [16, 32]}", random);
    try {
      resolve(expand(parse_config("trace: a\npolicy: h2o\nbudget: 1\n", "fuzz.yaml", {text})));
    } catch (const ConfigError&) {
    } catch (const std::exception& error) {
      ADD_FAILURE() << "seed " << seed << ": " << error.what() << "\n" << text;
    }
  }
}

}  // namespace
}  // namespace kv
