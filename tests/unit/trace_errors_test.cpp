// One test for every check: a good file broken in exactly one way, and the message that names the place.
#include <gtest/gtest.h>

#include <functional>

#include "core/error.hpp"
#include "tests/unit/trace_fixture.hpp"

namespace kv {
namespace {

struct Broken {
  std::string name;
  std::function<void(h5::File&)> damage;
  std::string message;  // after "FILE: "
};

void PrintTo(const Broken& broken, std::ostream* out) { *out << broken.name; }

/// Replaces a dataset by zeros of another type or shape.
void replace(h5::Group&& group, const char* name, h5::Type type, const h5::Shape& shape) {
  if (group.has(name)) group.remove(name);
  h5::Dataset dataset = group.create(name, type, shape, shape);
  dataset.write_bytes(std::vector<std::byte>(dataset.elements() * dataset.element_size()));
}

/// Overwrites 16-bit words of a dataset whose rows have length 6, from its start on.
void patch_words(h5::Group group, const char* name, const std::vector<std::uint16_t>& words) {
  h5::Dataset dataset = group.dataset(name);
  h5::Shape start(dataset.shape().size(), 0), count(dataset.shape().size(), 1);
  count.back() = words.size();
  dataset.write_block(start, count, std::as_bytes(std::span(words)));
}

h5::Group layer(h5::File& file, const char* name = "002") { return file.group("layers").group(name); }
h5::Group model(h5::File& file) { return file.group("model"); }
h5::Group tokens(h5::File& file) { return file.group("tokens"); }

template <class T>
void put(h5::Group group, const char* name, const std::vector<T>& values) {
  group.remove(name);
  group.create(name, std::span<const T>(values), {values.size()});
}

using h5::Type;
using Ints = std::vector<std::int32_t>;

const std::vector<Broken> header_cases{
    {"no_version", [](auto& f) { f.remove_attribute("kvtrace_version"); },
     "/: attribute kvtrace_version is missing (string expected)"},
    {"version_2", [](auto& f) { f.set_text("kvtrace_version", "2.0.0"); }, "/: kvtrace_version = '2.0.0'"},
    {"version_10", [](auto& f) { f.set_text("kvtrace_version", "10.0"); }, "/: kvtrace_version = '10.0'"},
    {"version_integer", [](auto& f) { f.set_integer("kvtrace_version", 1); },
     "/: attribute kvtrace_version is int64, string expected"},
    {"incomplete", [](auto& f) { f.set_flag("complete", false); }, "/: complete is not 1"},
    {"complete_text", [](auto& f) { f.set_text("complete", "1"); },
     "/: attribute complete is string, integer expected"},
    {"no_complete", [](auto& f) { f.remove_attribute("complete"); }, "/: attribute complete is missing"},
    {"tokens_0", [](auto& f) { f.set_integer("tokens", 0); }, "/: tokens = 0 is outside 1 to"},
    {"tokens_huge", [](auto& f) { f.set_integer("tokens", 1ll << 60); }, "/: tokens = 1152921504606846976 is out of"},
    {"tokens_many", [](auto& f) { f.set_integer("tokens", 100'000'000); },
     "/tokens/id: shape [100000000] expected, found [6]"},
    {"tokens_number", [](auto& f) { f.set_number("tokens", 6); }, "/: attribute tokens is float64, integer expected"},
    {"prompt_above", [](auto& f) { f.set_integer("prompt_tokens", 7); }, "/: prompt_tokens = 7 is outside 0 to 6"},
    {"prompt_negative", [](auto& f) { f.set_integer("prompt_tokens", -1); }, "/: prompt_tokens = -1 is outside"},
    {"other_hash", [](auto& f) { f.set_text("content_sha256", "abc"); }, "/: content_sha256 = 'abc', but the values"},
    {"hash_number", [](auto& f) { f.set_number("content_sha256", 3); },
     "/: attribute content_sha256 is float64, string expected"},
    {"no_model", [](auto& f) { f.remove("model"); }, "/: group model is missing"},
    {"no_layers", [](auto& f) { f.remove("layers"); }, "/: group layers is missing"},
    {"layers_dataset", [](auto& f) { f.remove("layers"), f.create("layers", Type::int32, {1}); },
     "/: member layers cannot be opened as a group"},
    {"no_layer", [](auto& f) { f.group("layers").remove("002"), f.group("layers").remove("005"); },
     "/layers: holds no layer"},
    {"heads_not_multiple", [](auto& f) { model(f).set_integer("kv_heads", 3); },
     "/model: query_heads = 4 is not a multiple of kv_heads = 3"},
    {"kv_heads_0", [](auto& f) { model(f).set_integer("kv_heads", 0); }, "/model: kv_heads = 0 is outside 1 to"},
    {"head_dim_huge", [](auto& f) { model(f).set_integer("head_dim", 1 << 20); }, "/model: head_dim = 1048576"},
    {"scale_text", [](auto& f) { model(f).set_text("scale", "x"); },
     "/model: attribute scale is string, number expected"},
    {"scale_nan", [](auto& f) { model(f).set_number("scale", NAN); }, "/model: scale = nan is not a positive number"},
    {"softcap_negative", [](auto& f) { model(f).set_number("softcap", -1); }, "/model: softcap = -1"},
    {"scaling_0", [](auto& f) { model(f).set_number("attention_scaling", 0); }, "/model: attention_scaling = 0"},
    {"rope_style", [](auto& f) { model(f).set_text("rope_style", "hafl"); },
     "/model: rope_style = 'hafl', expected 'half' or 'interleaved'; did you mean 'half'?"},
    {"no_rope_type", [](auto& f) { model(f).remove_attribute("rope_type"); }, "/model: attribute rope_type is missing"},
    {"no_inv_freq", [](auto& f) { model(f).remove("inv_freq"); }, "/model: dataset inv_freq is missing"},
    {"inv_freq_long", [](auto& f) { replace(model(f), "inv_freq", Type::float32, {4}); },
     "/model/inv_freq: has 4 values, 1 to 3 expected"},
    {"inv_freq_infinite",
     [](auto& f) {
       put(model(f), "inv_freq", std::vector<float>{1, INFINITY});
     },
     "/model/inv_freq[1]: inf is not finite"},
    {"inv_freq_double", [](auto& f) { replace(model(f), "inv_freq", Type::float64, {2}); },
     "/model/inv_freq: is float64, float32 expected"},
};

const std::vector<Broken> token_cases{
    {"position_repeats",
     [](auto& f) {
       put(tokens(f), "position", Ints{0, 1, 2, 2, 6, 9});
     },
     "/tokens/position[3]: 2 does not increase over 2"},
    {"position_negative",
     [](auto& f) {
       put(tokens(f), "position", Ints{-1, 1, 2, 3, 6, 9});
     },
     "/tokens/position[0]: -1 is negative"},
    {"position_short",
     [](auto& f) {
       put(tokens(f), "position", Ints{0, 1});
     },
     "/tokens/position: shape [6] expected, found [2]"},
    {"position_type", [](auto& f) { replace(tokens(f), "position", Type::int64, {6}); },
     "/tokens/position: is int64, int32 expected"},
    {"position_2d",
     [](auto& f) {
       replace(tokens(f), "position", Type::int32, {3, 6});
     },
     "/tokens/position: has 2 axes, one expected"},
    {"position_group", [](auto& f) { tokens(f).remove("position"), tokens(f).create_group("position"); },
     "/tokens: member position cannot be opened as a dataset"},
    {"logprob_nan",
     [](auto& f) {
       put(tokens(f), "logprob", std::vector<float>{0, NAN, 0, 0, 0, 0});
     },
     "/tokens/logprob[1]: nan is not finite"},
    {"segment_type", [](auto& f) { replace(tokens(f), "segment", Type::int32, {6}); },
     "/tokens/segment: is int32, uint8 expected"},
};

const std::vector<Broken> layer_cases{
    {"layer_text", [](auto& f) { layer(f).set_text("layer", "2"); },
     "/layers/002: attribute layer is string, integer expected"},
    {"layer_above", [](auto& f) { layer(f).set_integer("layer", 8); }, "/layers/002: layer = 8 is outside 0 to 7"},
    {"layer_twice", [](auto& f) { layer(f).set_integer("layer", 5); }, "are both layer 5"},
    {"window_negative", [](auto& f) { layer(f).set_integer("window", -1); }, "/layers/002: window = -1 is outside"},
    {"rope_word", [](auto& f) { layer(f).set_text("rope", "past\n"); },
     "/layers/002: rope = 'past?', expected 'pre' or 'post'; did you mean 'post'?"},
    {"recipe_word", [](auto& f) { layer(f).set_text("rope_recipe", "bf16"); }, "/layers/002: rope_recipe = 'bf16'"},
    {"no_k", [](auto& f) { layer(f).remove("k"); }, "/layers/002: dataset k is missing"},
    {"k_short",
     [](auto& f) {
       replace(layer(f), "k", Type::bfloat16, {2, 5, 6});
     },
     "/layers/002/k: shape [2, 6, 6] expected, found [2, 5, 6]"},
    {"v_rank",
     [](auto& f) {
       replace(layer(f), "v", Type::bfloat16, {2, 18});
     },
     "/layers/002/v: shape [2, 6, 3] expected, found [2, 18]"},
    {"q_heads",
     [](auto& f) {
       replace(layer(f), "q", Type::bfloat16, {3, 6, 6});
     },
     "/layers/002/q: shape [4, 6, 6] expected, found [3, 6, 6]"},
    {"k_dtype",
     [](auto& f) {
       replace(layer(f), "k", Type::float16, {2, 6, 6});
     },
     "/layers/002/k: is float16, little-endian bfloat16 expected"},
    {"q_dtype",
     [](auto& f) {
       replace(layer(f), "q", Type::float64, {4, 6, 6});
     },
     "/layers/002/q: is float64, little-endian float16 or bfloat16 or float32 expected"},
    {"v_integers",
     [](auto& f) {
       replace(layer(f, "005"), "v", Type::int32, {2, 6, 3});
     },
     "/layers/005/v: is int32, little-endian bfloat16 expected"},
    {"k_nan",
     [](auto& f) {
       patch_words(layer(f), "k", {0, 0, 0x7fc0});
     },
     "/layers/002/k[0, 0, 2]: nan is not finite"},
    {"q_infinite",
     [](auto& f) {
       patch_words(layer(f, "005"), "q", {0, 0xff80});
     },
     "/layers/005/q[0, 0, 1]: -inf is not finite"},
    {"o_nan", [](auto& f) { patch_words(layer(f, "005"), "o", {0x7fc0}); },
     "/layers/005/o[0, 0, 0]: nan is not finite"},
    {"wo_nan",
     [](auto& f) {
       patch_words(layer(f, "005"), "wo", {0, 0x7fc0});
     },
     "/layers/005/wo[0, 1]: nan"},
    {"sink_nan",
     [](auto& f) {
       put(layer(f, "005"), "sink_logit", std::vector<float>{0, 0, 0, NAN});
     },
     "/layers/005/sink_logit[3]: nan is not finite"},
    {"e_nan", [](auto& f) { patch_words(layer(f, "005"), "e", {0x7fc0}); },
     "/layers/005/e[0, 0, 0]: nan is not finite"},
    {"k_changed", [](auto& f) { patch_words(layer(f), "k", {0x4321}); }, "/: content_sha256 = '"},
    {"k_unwritten",
     [](auto& f) {
       layer(f).remove("k"), layer(f).create("k", Type::bfloat16, {2, 6, 6}, {1, 6, 6});
     },
     "/layers/002/k: has 0 of 2 chunks: it was not written completely"},
    {"o_shape",
     [](auto& f) {
       replace(layer(f, "005"), "o", Type::bfloat16, {4, 6, 3});
     },
     "/layers/005/o: shape [4, 3, 3] expected, found [4, 6, 3]"},
    {"wo_shape",
     [](auto& f) {
       replace(layer(f, "005"), "wo", Type::bfloat16, {12, 5});
     },
     "/layers/005/wo: shape [5, 12] expected, found [12, 5]"},
    {"sink_type", [](auto& f) { replace(layer(f, "005"), "sink_logit", Type::bfloat16, {4}); },
     "/layers/005/sink_logit: is bfloat16, little-endian float32 expected"},
    {"e_type",
     [](auto& f) {
       replace(layer(f, "005"), "e", Type::float16, {4, 3, 3});
     },
     "/layers/005/e: is float16, little-endian bfloat16 or float32 expected"},
    {"g_rank",
     [](auto& f) {
       replace(layer(f, "005"), "g", Type::float32, {4, 3, 3});
     },
     "/layers/005/g: has 3 axes"},
    {"attention_shape",
     [](auto& f) {
       replace(layer(f, "005"), "attention", Type::float16, {4, 6, 6});
     },
     "/layers/005/attention: shape [4, 3, 6] expected, found [4, 6, 6]"},
    {"q_index_falls",
     [](auto& f) {
       put(layer(f, "005"), "q_index", Ints{1, 3, 2});
     },
     "/layers/005/q_index[2]: 2 does not increase over 3"},
    {"q_index_above",
     [](auto& f) {
       put(layer(f, "005"), "q_index", Ints{1, 3, 6});
     },
     "/layers/005/q_index[2]: 6 is not below tokens = 6"},
    {"q_index_negative",
     [](auto& f) {
       put(layer(f, "005"), "q_index", Ints{-1, 3, 5});
     },
     "/layers/005/q_index[0]: -1 is negative"},
    {"q_index_short",
     [](auto& f) {
       put(layer(f, "005"), "q_index", Ints{1, 3});
     },
     "/layers/005/q: shape [4, 2, 6] expected, found [4, 3, 6]"},
    {"q_index_missing", [](auto& f) { layer(f, "005").remove("q_index"); },
     "/layers/005/q: shape [4, 6, 6] expected, found [4, 3, 6]"},
    {"layer_dataset",
     [](auto& f) { f.group("layers").remove("005"), replace(f.group("layers"), "005", Type::int32, {1}); },
     "/layers: member 005 cannot be opened as a group"},
};

class BrokenTrace : public testing::TestWithParam<Broken> {};

TEST_P(BrokenTrace, IsRefusedWithItsPlace) {
  const test::TempDir dir;
  const std::filesystem::path path = dir / "a.h5";
  test::write(path, test::sample());
  {
    h5::File file = h5::File::modify(path);
    GetParam().damage(file);
    file.close();
  }
  try {
    Trace::open(path);
    FAIL() << "opened";
  } catch (const TraceError& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.rfind(path.string() + ": ", 0), 0u) << message;
    EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

const auto name_of_case = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Header, BrokenTrace, testing::ValuesIn(header_cases), name_of_case);
INSTANTIATE_TEST_SUITE_P(Tokens, BrokenTrace, testing::ValuesIn(token_cases), name_of_case);
INSTANTIATE_TEST_SUITE_P(Layers, BrokenTrace, testing::ValuesIn(layer_cases), name_of_case);

std::string open_message(const std::filesystem::path& path) {
  try {
    Trace::open(path);
  } catch (const TraceError& error) {
    return error.what();
  }
  return "(no error)";
}

TEST(BrokenPlainTrace, BigEndianIsNamed) {
  const test::TempDir dir;
  test::write_plain(dir / "a.h5");
  std::string bytes = test::read_file(dir / "a.h5");
  const std::string little("\x11\x20\x1f\x00\x04\x00\x00\x00", 8);  // HDF5's message for a float32
  for (std::size_t at = 0; (at = bytes.find(little, at)) != std::string::npos; ++at) bytes[at + 1] |= 1;
  test::write_file(dir / "b.h5", bytes);
  EXPECT_NE(open_message(dir / "b.h5").find("/layers/000/q: is big-endian float32, little-endian float16 or"),
            std::string::npos)
      << open_message(dir / "b.h5");
}

TEST(BrokenPlainTrace, SizesAreNotBelievedWithoutBytes) {
  const test::TempDir dir;
  test::write_plain(dir / "a.h5");
  {
    h5::File file = h5::File::modify(dir / "a.h5");  // an honest shape of 512 GiB that nothing was written to
    file.set_integer("tokens", 1 << 24);
    for (const char* name : {"q", "k", "v"}) {
      layer(file, "000").remove(name);
      layer(file, "000").create(name, Type::float32, {2, 1 << 24, 4}, {1, 4096, 4});
    }
    file.close();
  }
  EXPECT_NE(open_message(dir / "a.h5").find("/layers/000/q: has 0 of 8192 chunks"), std::string::npos)
      << open_message(dir / "a.h5");
}

TEST(BrokenPlainTrace, ChecksumsCatchFlippedTensorBytes) {
  const test::TempDir dir;
  test::SampleTrace s = test::sample();
  test::write(dir / "a.h5", s);
  const std::string bytes = test::read_file(dir / "a.h5");
  test::write_file(dir / "b.h5", bytes);
  // The last deflate stream of the file belongs to some tensor or index; any flip in it must be noticed.
  const std::size_t at = bytes.rfind("\x78\x01");
  ASSERT_NE(at, std::string::npos);
  std::string flipped = bytes;
  flipped[at + 4] = static_cast<char>(flipped[at + 4] ^ 0x10);
  test::write_file(dir / "b.h5", flipped);
  EXPECT_NE(open_message(dir / "b.h5").find("cannot be read (HDF5: "), std::string::npos) << open_message(dir / "b.h5");
}

}  // namespace
}  // namespace kv
