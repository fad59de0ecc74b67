// A wrong policy must not compile, and the compiler's words must say what is wrong. The README's own policy must.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace {

struct Compiled {
  bool ok;
  std::string output;
};

Compiled compile(const std::string& source) {
  const auto file = std::filesystem::temp_directory_path() / fmt::format("kvreplay-compile-{}.cpp", getpid());
  std::ofstream(file) << source;
  const std::string command = fmt::format("{} -std=c++20 -Wall -Wextra -Werror -fsyntax-only -I{} {} 2>&1", KV_CXX,
                                          KV_SOURCE_DIR, file.string());
  Compiled result{false, ""};
  FILE* pipe = popen(command.c_str(), "r");
  std::array<char, 4096> chunk;
  while (std::size_t n = fread(chunk.data(), 1, chunk.size(), pipe)) result.output.append(chunk.data(), n);
  result.ok = pclose(pipe) == 0;
  std::filesystem::remove(file);
  return result;
}

/// A policy whose members are `body`.
std::string policy(const std::string& body) {
  return "#include \"policies/policy.hpp\"\nnamespace {\nstruct P : kv::Policy {\n"
         "static constexpr kv::PolicyDoc doc{\"p\", \"P\", \"-\", \"-\"};\n" +
         body + "\n};\nKV_REGISTER(P);\n}\n";
}

const std::string score = "KV_HD float score(auto slot) const { return float(slot.token); }\n";

struct Wrong {
  const char* name;
  std::string body;
  const char* says;
};

class CompileFail : public testing::TestWithParam<Wrong> {};

TEST_P(CompileFail, SaysWhatIsWrong) {
  const Compiled result = compile(policy(GetParam().body));
  EXPECT_FALSE(result.ok);
  EXPECT_NE(result.output.find(GetParam().says), std::string::npos) << result.output.substr(0, 2000);
}

INSTANTIATE_TEST_SUITE_P(
    Hooks, CompileFail,
    testing::Values(
        Wrong{"NoScore", "", "exactly one of score(slot), score_in(head, slot) and on_compress(team, head)"},
        Wrong{"TwoScores", score + "KV_HD float score_in(auto& head, int s) const { return float(head.token(s)); }",
              "exactly one of score"},
        Wrong{"ScoreReturnsDouble", "KV_HD double score(auto slot) const { return double(slot.token); }",
              "float score(auto slot) const"},
        Wrong{"ScoreTakesTwo", "KV_HD float score(auto slot, int) const { return float(slot.token); }",
              "float score(auto slot) const"},
        Wrong{"ScoreIsNotConst", "KV_HD float score(auto slot) { return float(slot.token); }",
              "float score(auto slot) const"},
        Wrong{"AttentionTakesHead",
              "struct Slot { float m = 0; };\n" + score +
                  "KV_HD void on_attention(auto slot) const { slot.state.m = 1; }",
              "void on_attention(auto slot, auto seen) const"},
        Wrong{"MisspeltHook",
              "struct Slot { float m = 0; };\n" + score +
                  "KV_HD void on_atention(auto slot, auto seen) const { slot.state.m = seen.mean(); }",
              "is a hook's name misspelt?"},
        Wrong{"MergeReturnsInt", score + "KV_HD int on_merge(auto& head, int s) const { return head.next(s); }",
              "kv::Fold on_merge(auto& head, int victim) const"},
        Wrong{"FoldWithoutMerge",
              "struct Slot { float m = 0; };\n" + score +
                  "KV_HD void on_append(auto, auto& head, int s) const { head.state(s).m = 1; }\n"
                  "KV_HD void on_fold(Slot& into, const Slot& from, const kv::Fold&) const { into.m += from.m; }",
              "on_fold, on_target and key_weight are never called without on_merge"},
        Wrong{"SlotIsNotPlain", "struct Slot { std::vector<float> m; };\n" + score,
              "Slot, HeadState and Scratch must be plain data"},
        Wrong{"WeighTakesOne",
              "struct Slot { float m = 0; };\n" + score +
                  "KV_HD void on_attention(auto slot, auto seen) const { slot.state.m = seen.mean(); }\n"
                  "KV_HD static float weigh(float p) { return p; }",
              "weigh must be"}),
    [](const auto& wrong) { return wrong.param.name; });

TEST(CompilePolicy, ARightOneCompiles) {
  const Compiled result =
      compile(policy("struct Slot { float m = 0; };\n" + score +
                     "KV_HD void on_attention(auto slot, auto seen) const { slot.state.m += seen.mean(); }"));
  EXPECT_TRUE(result.ok) << result.output;
}

TEST(CompilePolicy, TheReadmesPolicyCompiles) {
  std::stringstream readme;
  readme << std::ifstream(KV_SOURCE_DIR "/README.md").rdbuf();
  const std::string text = readme.str(), fence = "```cpp\n";
  const std::size_t start = text.find(fence);
  ASSERT_NE(start, std::string::npos);
  const std::string source =
      text.substr(start + fence.size(), text.find("```", start + fence.size()) - start - fence.size());
  ASSERT_NE(source.find("KV_REGISTER("), std::string::npos);
  const Compiled result = compile(source);
  EXPECT_TRUE(result.ok) << result.output;
}

}  // namespace
