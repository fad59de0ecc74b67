#include "experiments/trace_identity.hpp"

#include <gtest/gtest.h>

#include <functional>

#include "trace_fixture.hpp"

namespace kv {
namespace {

using test::SampleTrace;

/// What the reader makes of a written sample.
TraceHeader header_of(const test::TempDir& dir, const SampleTrace& sample) {
  const auto file = dir / "t.h5";
  std::filesystem::remove(file);
  test::write(file, sample);
  return Trace::open(file).header();
}

using Change = std::function<void(SampleTrace&)>;

TEST(TraceIdentity, CountsWhateverCanChangeANumber) {
  const std::vector<std::pair<const char*, Change>> changes{
      {"prompt_tokens", [](SampleTrace& s) { s.header.prompt_tokens = 3; }},
      {"scale", [](SampleTrace& s) { s.header.model.scale = 0.5; }},
      {"softcap", [](SampleTrace& s) { s.header.model.softcap = 0; }},
      {"rope_type", [](SampleTrace& s) { s.header.model.rope_type = "none", s.header.model.inv_freq = {}; }},
      {"rope_style", [](SampleTrace& s) { s.header.model.rope_style = RopeStyle::half; }},
      {"attention_scaling", [](SampleTrace& s) { s.header.model.attention_scaling = 1; }},
      {"inv_freq", [](SampleTrace& s) { s.header.model.inv_freq[1] = 0.02f; }},
      {"position", [](SampleTrace& s) { s.header.position.back() = 10; }},
      {"layer", [](SampleTrace& s) { s.infos[1].index = 6; }},
      {"window", [](SampleTrace& s) { s.infos[1].window = 3; }},
      {"rope", [](SampleTrace& s) { s.infos[1].rope_post = false; }},
      {"rope_recipe", [](SampleTrace& s) { s.infos[1].recipe = RopeRecipe::model; }},
      {"q_index",
       [](SampleTrace& s) {
         s.infos[1].q_index = {1, 4, 5};
       }},
      {"sink_logit", [](SampleTrace& s) { s.tensors[1].sink_logit[0] += 1; }},
      {"no sink_logit", [](SampleTrace& s) { s.tensors[1].sink_logit.clear(); }},
      {"wo", [](SampleTrace& s) { s.tensors[1].wo[2] = 1.5f; }},
      {"no wo", [](SampleTrace& s) { s.tensors[1].wo.clear(); }},
      {"o", [](SampleTrace& s) { s.tensors[1].o[3] = 1.5f; }},
      {"no o", [](SampleTrace& s) { s.tensors[1].o.clear(); }},
      {"no e", [](SampleTrace& s) { s.tensors[1].e.clear(); }},
  };
  const test::TempDir dir;
  const TraceHeader plain = header_of(dir, test::sample());
  std::map<std::string, std::string> owners{{trace_identity(plain), "no change"}};
  for (const auto& [name, change] : changes) {
    SampleTrace changed = test::sample();
    change(changed);
    const TraceHeader header = header_of(dir, changed);
    EXPECT_EQ(header.content_sha256, plain.content_sha256) << name << ": q, k and v are the same";
    const auto [at, fresh] = owners.emplace(trace_identity(header), name);
    EXPECT_TRUE(fresh) << name << " is taken for " << at->second;
  }
}

TEST(TraceIdentity, CountsTheContent) {
  const test::TempDir dir;
  const std::string plain = trace_identity(header_of(dir, test::sample()));
  SampleTrace changed = test::sample();
  changed.tensors[0].v[0] = 1.5f;
  EXPECT_NE(trace_identity(header_of(dir, changed)), plain);
  EXPECT_NE(trace_identity(header_of(dir, test::sample(Dtype::float16))), plain);
}

TEST(TraceIdentity, IgnoresWhereTheTraceIsAndWhatItIsCalled) {
  const test::TempDir dir, other;
  SampleTrace renamed = test::sample();
  renamed.header.dataset = "another", renamed.header.model_id = "big", renamed.header.created_utc = "2027";
  renamed.header.token_id.back() = 99, renamed.header.logprob.back() = -1;
  EXPECT_EQ(trace_identity(header_of(other, renamed)), trace_identity(header_of(dir, test::sample())));
}

}  // namespace
}  // namespace kv
