// A layer on the device is what the CPU engine prepares, to the bit: words as stored, and rotated. Skipped without a device.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "core/trace_words.hpp"
#include "kernels/device_layer.hpp"
#include "kernels/engine.hpp"
#include "tests/synthetic.hpp"

namespace kv::test {
namespace {

/// One layer at positions 5, 8, 11, ..., of which the queries of tokens from `first` on were recorded.
std::filesystem::path write_layer(const Shape& s, RopeRecipe recipe, bool post, int first) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("kvreplay-layer-{}.h5", getpid());
  TraceHeader header = header_of(s);
  for (int t = 0; t < s.tokens; ++t) header.position[static_cast<std::size_t>(t)] = 5 + 3 * t;
  LayerInfo info;
  info.recipe = recipe, info.rope_post = post;
  for (int t = first; t < s.tokens && first > 0; ++t) info.q_index.push_back(t);
  LayerTensors tensors = tensors_of(s, info, 1);
  const auto recorded = static_cast<std::size_t>(s.kv_heads * s.group * (s.tokens - first));
  tensors.q.resize(recorded * static_cast<std::size_t>(s.head_dim));
  tensors.e.resize(recorded * static_cast<std::size_t>(s.value_dim));
  TraceWriter writer(path, header);
  writer.write_layer(info, tensors);
  writer.close();
  return path;
}

std::vector<std::byte> download(const void* from, std::size_t bytes) {
  std::vector<std::byte> host(bytes);
  KV_CUDA_TRY(cudaMemcpy(host.data(), from, bytes, cudaMemcpyDeviceToHost));
  return host;
}

/// The log-sum-exps of a prefill's rows are those of the CPU engine's full attention.
void expect_full_lse(Session& session, const Prefill& prefill, const LayerData& device) {
  const std::vector<int> tokens = tokens_between(prefill.first, prefill.last);
  const auto reference = session.reference(0, tokens);
  const auto heads = static_cast<std::size_t>(session.header().model.query_heads),
             group = static_cast<std::size_t>(session.header().model.group()), rows = tokens.size();
  std::vector<float> got(heads * rows);
  KV_CUDA_TRY(cudaMemcpy(got.data(), device.prefill_lse, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t r = 0; r < rows; ++r)
      ASSERT_NEAR(got[(h / group * rows + r) * group + h % group], reference->lse[h * rows + r], 2e-5)
          << "head " << h << ", token " << tokens[r];
}

void compare(const std::filesystem::path& path) {
  Session session(path);
  const DeviceTrace trace(session.header());
  Upload upload;
  DeviceLayer layer(trace, session, 0, nullptr, upload);
  const Prefill prefill{31, 50};
  const LayerData device = layer.seen(trace, {session.header().tokens - 1}, prefill, nullptr);
  const auto cpu = session.layer(0);
  const auto expect = [&](const char* name, const void* got, const std::vector<float>& expected, Dtype dtype) {
    EXPECT_TRUE(download(got, expected.size() * size_of(dtype)) == narrow(dtype, expected)) << name;
  };
  const Dtype elements = trace.data.elements;
  expect("q", device.q, cpu->tensors.q, elements);
  expect("k", device.k, cpu->tensors.k, elements);
  expect("v", device.v, cpu->tensors.v, elements);
  expect("q_rotated", device.q_rotated, cpu->q_rotated, elements);
  expect("k_rotated", device.k_rotated, cpu->k_rotated, elements);
  expect("e", device.e, cpu->tensors.e, Dtype::float32);
  expect("wo", layer.wo(), cpu->tensors.wo, Dtype::float32);
  expect("sink_logit", device.sink_logit, cpu->tensors.sink_logit, Dtype::float32);
  expect("cos", device.cos, cpu->by_slot->cosines(), Dtype::float32);
  expect("sin", device.sin, cpu->by_slot->sines(), Dtype::float32);
  EXPECT_EQ(device.rope_step, cpu->by_slot->step_dtype());
  expect_full_lse(session, prefill, device);
  std::filesystem::remove(path);
}

TEST(DeviceLayer, IsTheCpuEnginesToTheBit) {
  if (devices().empty()) GTEST_SKIP() << "no CUDA device: " << why_no_device();
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
    for (const RopeStyle style : {RopeStyle::half, RopeStyle::interleaved})
      for (const RopeRecipe recipe : {RopeRecipe::model, RopeRecipe::fp32})
        for (const int first : {0, 11}) {
          Shape s{.tokens = 90, .prompt_tokens = 50, .dtype = dtype, .style = style};
          s.sink_logit = s.wo = s.e = true;
          SCOPED_TRACE(fmt::format("{}, style {}, recipe {}, queries from {}", kv::name_of(dtype),
                                   static_cast<int>(style), static_cast<int>(recipe), first));
          compare(write_layer(s, recipe, false, first));
        }
  Shape large;
  large.sink_logit = large.wo = large.e = true;
  large.head_dim = large.value_dim = 128;
  large.tokens = 40000, large.prompt_tokens = 30000;  // several pieces of pinned memory
  compare(write_layer(large, RopeRecipe::model, false, 0));
  large.tokens = 90, large.prompt_tokens = 50;
  compare(write_layer(large, RopeRecipe::model, true, 0));
  large.rope = false;
  compare(write_layer(large, RopeRecipe::model, false, 0));
}

}  // namespace
}  // namespace kv::test
