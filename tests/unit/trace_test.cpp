// What is written is read back to the bit; the two sample traces open; unfit places and values are refused.
#include "core/trace.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <thread>

#include "core/error.hpp"
#include "core/trace_words.hpp"
#include "core/trace_writer.hpp"
#include "tests/unit/trace_fixture.hpp"

namespace kv {
namespace {

using test::sample;
using test::SampleTrace;
using test::TempDir;

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TraceError& error) {
    return error.what();
  }
  return "(no error)";
}

std::string open_message(const std::filesystem::path& path) {
  return message_of([&] { Trace::open(path); });
}

/// Bit-equal, so that NaN and signed zeros cannot hide.
void expect_same(const std::vector<float>& found, const std::vector<float>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i)
    ASSERT_EQ(std::bit_cast<std::uint32_t>(found[i]), std::bit_cast<std::uint32_t>(expected[i])) << "at " << i;
}

void expect_same(const LayerTensors& found, const LayerTensors& expected) {
  expect_same(found.q, expected.q);
  expect_same(found.k, expected.k);
  expect_same(found.v, expected.v);
  expect_same(found.o, expected.o);
  expect_same(found.wo, expected.wo);
  expect_same(found.sink_logit, expected.sink_logit);
  expect_same(found.e, expected.e);
}

void expect_same(const TraceHeader& found, const TraceHeader& expected) {
  EXPECT_EQ(found.version, "1.0.0");
  EXPECT_EQ(found.content_sha256.size(), 64u);
  EXPECT_EQ(found.created_utc, expected.created_utc);
  EXPECT_EQ(found.producer, expected.producer);
  EXPECT_EQ(found.framework, expected.framework);
  EXPECT_EQ(found.model_id, expected.model_id);
  EXPECT_EQ(found.dataset, expected.dataset);
  EXPECT_EQ(found.license, expected.license);
  EXPECT_EQ(found.tokens, expected.tokens);
  EXPECT_EQ(found.prompt_tokens, expected.prompt_tokens);
  EXPECT_EQ(found.dtype, expected.dtype);
  EXPECT_EQ(found.token_id, expected.token_id);
  EXPECT_EQ(found.position, expected.position);
  EXPECT_EQ(found.segment, expected.segment);
  expect_same(found.logprob, expected.logprob);
  const ModelInfo &a = found.model, &b = expected.model;
  EXPECT_EQ(a.layers, b.layers);
  EXPECT_EQ(a.query_heads, b.query_heads);
  EXPECT_EQ(a.kv_heads, b.kv_heads);
  EXPECT_EQ(a.head_dim, b.head_dim);
  EXPECT_EQ(a.value_dim, b.value_dim);
  EXPECT_EQ(a.hidden_size, b.hidden_size);
  EXPECT_EQ(a.scale, b.scale);
  EXPECT_EQ(a.softcap, b.softcap);
  EXPECT_EQ(a.rope_type, b.rope_type);
  EXPECT_EQ(a.rope_style, b.rope_style);
  EXPECT_EQ(a.attention_scaling, b.attention_scaling);
  expect_same(a.inv_freq, b.inv_freq);
}

class RoundTrip : public testing::TestWithParam<Dtype> {};

TEST_P(RoundTrip, GivesTheSameHeaderAndBits) {
  const TempDir dir;
  const SampleTrace s = sample(GetParam());
  test::write(dir / "a.h5", s);
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.part"));
  const Trace trace = Trace::open(dir / "a.h5");
  const TraceHeader& h = trace.header();
  expect_same(h, s.header);
  ASSERT_EQ(h.layers.size(), 2u);
  EXPECT_EQ(h.layers[0].index, 2);
  EXPECT_EQ(h.layers[0].path, "/layers/002");
  EXPECT_TRUE(h.layers[0].q_index.empty() && !h.layers[0].rope_post && h.layers[0].window == 0);
  EXPECT_FALSE(h.layers[0].has_o || h.layers[0].has_wo || h.layers[0].has_sink_logit || h.layers[0].has_e);
  EXPECT_EQ(h.layers[0].recipe, RopeRecipe::model);
  EXPECT_EQ(h.layers[1].recipe, RopeRecipe::fp32);
  EXPECT_EQ(h.layers[1].q_index, s.infos[1].q_index);
  EXPECT_EQ(h.layers[1].window, 4);
  EXPECT_TRUE(h.layers[1].rope_post && h.layers[1].has_o && h.layers[1].has_wo && h.layers[1].has_sink_logit);
  EXPECT_FALSE(h.layers[1].has_g || h.layers[1].has_attention);
  for (int i = 0; i < 2; ++i) expect_same(trace.read_layer(i), s.tensors[static_cast<std::size_t>(i)]);
  const std::size_t word = size_of(GetParam());
  EXPECT_EQ(h.bytes(0, "k"), 2 * 6 * 6 * word);
  EXPECT_EQ(h.bytes(0, "q"), 4 * 6 * 6 * word);
  EXPECT_EQ(h.bytes(1, "q"), 4 * 3 * 6 * word);
  EXPECT_EQ(h.bytes(1, "wo"), 5 * 12 * word);
  EXPECT_EQ(h.bytes(1, "sink_logit"), 16u);
  EXPECT_EQ(h.bytes(0, "o") + h.bytes(1, "attention") + h.bytes(1, "nonsense"), 0u);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, RoundTrip, testing::Values(Dtype::float16, Dtype::bfloat16, Dtype::float32),
                         [](const auto& param) { return std::string(name_of(param.param)); });

TEST(Trace, EqualContentGivesEqualFiles) {
  const TempDir dir;
  test::write(dir / "a.h5", sample());
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // HDF5 would stamp objects with the second
  test::write(dir / "b.h5", sample());
  EXPECT_EQ(test::read_file(dir / "a.h5"), test::read_file(dir / "b.h5"));
}

TEST(Trace, RoundTripsOneTokenOneHead) {
  const TempDir dir;
  SampleTrace s = sample(Dtype::float32);
  TraceHeader& h = s.header;
  h.tokens = 1, h.prompt_tokens = 0, h.token_id.clear(), h.segment.clear(), h.logprob.clear(), h.position = {3};
  h.model.query_heads = h.model.kv_heads = h.model.head_dim = h.model.value_dim = 1;
  h.model.rope_type = "none", h.model.inv_freq.clear();
  s.infos.resize(1);
  s.tensors = {test::random_tensors(h, s.infos[0], true)};
  test::write(dir / "one.h5", s);
  const Trace trace = Trace::open(dir / "one.h5");
  expect_same(trace.header(), h);
  expect_same(trace.read_layer(0), s.tensors[0]);
}

TEST(Trace, RoundTripsManyChunksAndSlabs) {
  const TempDir dir;
  SampleTrace s = sample(Dtype::float32);
  TraceHeader& h = s.header;  // 5000 tokens are two chunks; one head of 20 MB is two slabs of the reader
  h.tokens = 5000, h.token_id.clear(), h.segment.clear(), h.logprob.clear(), h.position.resize(5000);
  std::iota(h.position.begin(), h.position.end(), 0);
  h.model.query_heads = h.model.kv_heads = 1, h.model.head_dim = 1000;
  s.infos.resize(1);
  s.tensors = {test::random_tensors(h, s.infos[0], false)};
  for (float& value : s.tensors[0].q) value = value > 0 ? 1.0f : -1.0f;  // deflates fast
  for (float& value : s.tensors[0].k) value = value > 0 ? 2.0f : -2.0f;
  test::write(dir / "long.h5", s);
  expect_same(Trace::open(dir / "long.h5").read_layer(0), s.tensors[0]);
}

TEST(Trace, FillsInWhatOldPlainFilesLeaveOut) {
  const TempDir dir;
  test::write_plain(dir / "plain.h5");
  const Trace trace = Trace::open(dir / "plain.h5");
  const TraceHeader& h = trace.header();
  EXPECT_EQ(h.version, "1.7.3");
  EXPECT_EQ(h.content_sha256.size(), 64u);
  EXPECT_EQ(h.position, (std::vector<std::int32_t>{0, 1, 2, 3, 4}));
  EXPECT_TRUE(h.token_id.empty() && h.segment.empty() && h.logprob.empty() && h.model.inv_freq.empty());
  EXPECT_EQ(h.model.scale, 1);
  EXPECT_EQ(h.model.softcap, 0);
  EXPECT_EQ(h.model.attention_scaling, 1);
  EXPECT_EQ(h.model.rope_style, RopeStyle::half);
  EXPECT_EQ(h.layers.at(0).recipe, RopeRecipe::model);
  EXPECT_FALSE(h.layers[0].rope_post);
  EXPECT_EQ(h.layers[0].window, 0);
  std::vector<float> expected(40);
  std::iota(expected.begin(), expected.end(), 0.0f);
  const LayerTensors t = trace.read_layer(0);
  expect_same(t.q, expected);
  expect_same(t.k, expected);
  expect_same(t.v, expected);
}

TEST(Trace, ReadsQueryIndexOfAllTokensAsNone) {
  const TempDir dir;
  SampleTrace s = sample();
  s.infos[0].q_index = {0, 1, 2, 3, 4, 5};
  test::write(dir / "a.h5", s);
  EXPECT_TRUE(Trace::open(dir / "a.h5").header().layers[0].q_index.empty());
}

TEST(Trace, KnowsGradientsAndAttentionItDoesNotRead) {
  const TempDir dir;
  test::write(dir / "a.h5", sample());
  {
    h5::File file = h5::File::modify(dir / "a.h5");
    h5::Group layer = file.group("layers").group("005");
    const std::vector<float> g(2 * 4 * 3 * 3, 1.0f);
    layer.create("g", std::span<const float>(g), {2, 4, 3, 3});
    const std::vector<std::byte> attention(4 * 3 * 6 * 2);
    layer.create("attention", h5::Type::float16, {4, 3, 6}, {1, 3, 6}).write_bytes(attention);
  }
  const TraceHeader h = Trace::open(dir / "a.h5").header();
  EXPECT_TRUE(h.layers[1].has_g && h.layers[1].has_attention);
  EXPECT_EQ(h.layers[1].g_samples, 2);
  EXPECT_EQ(h.bytes(1, "g"), 2u * 4 * 3 * 3 * 4);
  EXPECT_EQ(h.bytes(1, "attention"), 4u * 3 * 6 * 2);
}

TEST(Trace, OpensTheSampleTraces) {
  const std::filesystem::path data = KV_TEST_DATA;
  const std::vector<std::pair<std::string, std::string>> samples{
      {"smollm2-135m-retrieval.h5", "2243cc8be91dc388dde670350db9a03dfd1455dca22bab6acab0c0d834e3fdf7"},
      {"smollm2-135m-wikitext2.h5", "19521e5a7855645147c02ab1a410babfc92d6c97ea0b44d557964dadbd626ba6"}};
  for (const auto& [name, hash] : samples) {
    const Trace trace = Trace::open(data / name);
    const TraceHeader& h = trace.header();
    EXPECT_EQ(h.content_sha256, hash);
    EXPECT_EQ(h.tokens, 1024);
    EXPECT_EQ(h.prompt_tokens, 768);
    EXPECT_EQ(h.dtype, Dtype::bfloat16);
    EXPECT_EQ(h.model.layers, 30);
    EXPECT_EQ(h.model.query_heads, 9);
    EXPECT_EQ(h.model.kv_heads, 3);
    EXPECT_EQ(h.model.head_dim, 64);
    EXPECT_EQ(h.model.scale, 0.125);
    EXPECT_EQ(h.model.inv_freq.size(), 32u);
    ASSERT_EQ(h.layers.size(), 4u);
    const int recorded[] = {0, 9, 19, 29};
    for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(h.layers[i].index, recorded[i]);
    EXPECT_TRUE(h.layers[3].has_o);
    const LayerTensors t = trace.read_layer(3);
    EXPECT_EQ(t.o.size(), 9u * 1024 * 64);
    for (const float value : t.q) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST(Trace, OpensAndReadsFromManyThreads) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "ASan's allocator, unlike the C library's, is not made for a fork beside other threads";
#endif
  const TempDir dir;
  const SampleTrace s = sample();
  test::write(dir / "a.h5", s);
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i)
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) expect_same(Trace::open(dir / "a.h5").read_layer(1), s.tensors[1]);
    });
  for (std::thread& thread : threads) thread.join();
}

TEST(Trace, NeedsNoLock) {
  const TempDir dir;
  test::write(dir / "a.h5", sample());
  const int descriptor = open((dir / "a.h5").c_str(), O_RDONLY);
  ASSERT_EQ(flock(descriptor, LOCK_EX | LOCK_NB), 0);
  EXPECT_EQ(open_message(dir / "a.h5"), "(no error)");
  close(descriptor);
}

TEST(Trace, NamesWhatIsWrongWithAPlace) {
  const TempDir dir;
  test::write_file(dir / "empty.h5", "");
  test::write_file(dir / "text.h5", "hello\n");
  std::filesystem::create_directory(dir / "folder.h5");
  const auto starts = [](const std::filesystem::path& path, const std::string& problem) {
    EXPECT_EQ(open_message(path).rfind(path.string() + ": " + problem, 0), 0u) << open_message(path);
    EXPECT_EQ(open_message(path).find('\n'), std::string::npos);
  };
  starts(dir / "missing.h5", "no such file");
  starts(dir / "empty.h5", "is empty (0 bytes)");
  starts(dir / "text.h5", "is not an HDF5 file");
  starts(dir / "folder.h5", "is a directory");
  starts("/dev/null", "is not a regular file");
  test::write(dir / "a.h5", sample());
  const std::string bytes = test::read_file(dir / "a.h5");
  test::write_file(dir / "short.h5", bytes.substr(0, bytes.size() / 2));
  starts(dir / "short.h5", "cannot be opened as HDF5 (HDF5: ");
  if (geteuid() == 0) return;  // root reads everything
  std::filesystem::permissions(dir / "a.h5", std::filesystem::perms::none);
  starts(dir / "a.h5", "cannot be read: Permission denied");
}

TEST(TraceWriter, LeavesNothingBehindWithoutClose) {
  const TempDir dir;
  const SampleTrace s = sample();
  {
    TraceWriter writer(dir / "a.h5", s.header);
    writer.write_layer(s.infos[0], s.tensors[0]);
    EXPECT_TRUE(std::filesystem::exists(dir / "a.h5.part"));
    std::filesystem::copy_file(dir / "a.h5.part", dir / "copy.h5");  // as if killed here
  }
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5"));
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.part"));
  EXPECT_NE(open_message(dir / "copy.h5"), "(no error)");
  {
    TraceWriter writer(dir / "a.h5", s.header);
    EXPECT_NE(message_of([&] { writer.close(); }).find("a.h5: /layers: holds no layer"), std::string::npos);
  }
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.part"));
}

TEST(TraceWriter, RefusesWhatDoesNotFit) {
  const TempDir dir;
  const SampleTrace s = sample(Dtype::float16);
  TraceWriter writer(dir / "a.h5", s.header);
  const auto refused = [&](LayerInfo info, LayerTensors tensors, const std::string& text) {
    const std::string message = message_of([&] { writer.write_layer(info, tensors); });
    EXPECT_NE(message.find((dir / "a.h5").string() + ": /layers/00"), std::string::npos) << message;
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  LayerTensors t = s.tensors[0];
  t.k.pop_back();
  refused(s.infos[0], t, "/k: 71 values given, shape [2, 6, 6] needs 72");
  EXPECT_NE(message_of([&] { writer.close(); }), "(no error)");  // half a layer lies there
  LayerInfo info = s.infos[0];
  info.index = 3, t = s.tensors[0], t.v[4] = std::numeric_limits<float>::quiet_NaN();
  refused(info, t, "/v: value nan (number 4) is not finite in float16");
  info.index = 4, t = s.tensors[0], t.q[7] = 65520;
  refused(info, t, "/q: value 65520 (number 7) is not finite in float16");
  info.index = 8;
  refused(info, s.tensors[0], "layer = 8 is outside 0 to 7");
  info.index = 6, info.q_index = {3, 3};
  refused(info, s.tensors[0], "q_index[1]: 3 does not increase over 3");
}

TEST(TraceWriter, RefusesBadHeadersAndPlaces) {
  const TempDir dir;
  const auto refused = [&](const std::function<void(TraceHeader&)>& change, const std::string& text) {
    TraceHeader h = sample().header;
    change(h);
    const std::string message = message_of([&] { TraceWriter writer(dir / "a.h5", h); });
    EXPECT_NE(message.find(text), std::string::npos) << message;
    EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.part"));
  };
  refused([](TraceHeader& h) { h.tokens = 0; }, "/: tokens = 0 is outside");
  refused([](TraceHeader& h) { h.prompt_tokens = 7; }, "/: prompt_tokens = 7 is outside 0 to 6");
  refused([](TraceHeader& h) { h.model.kv_heads = 3; }, "/model: query_heads = 4 is not a multiple of kv_heads = 3");
  refused([](TraceHeader& h) { h.model.inv_freq.clear(); }, "/model/inv_freq: is empty");
  refused([](TraceHeader& h) { h.position[2] = 1; }, "/tokens/position[2]: 1 does not increase over 1");
  refused([](TraceHeader& h) { h.token_id.pop_back(); }, "/tokens/id: has 5 values for 6 tokens");
  refused([](TraceHeader& h) { h.logprob[1] = NAN; }, "/tokens/logprob[1]: nan is not finite");
  const std::string message = message_of([&] { TraceWriter(dir / "no" / "a.h5", sample().header); });
  EXPECT_NE(message.find("cannot be created: No such file or directory"), std::string::npos) << message;
}

}  // namespace
}  // namespace kv
