// Stored words against known values, every 16-bit word included.
#include "core/trace_words.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "core/hdf5.hpp"
#include "core/trace.hpp"
#include "tests/unit/trace_fixture.hpp"

namespace kv {
namespace {

std::vector<std::byte> bytes_of(const std::vector<std::uint16_t>& words) {
  const auto bytes = std::as_bytes(std::span(words));
  return {bytes.begin(), bytes.end()};
}

TEST(TraceWords, WidensKnownWords) {
  const std::vector<std::byte> bfloat = bytes_of({0x3f80, 0xc000, 0x4049, 0x0001, 0x7f7f, 0x8000});
  const float expected_bfloat[] = {1.0f, -2.0f, 3.140625f, 0x1p-133f, 0x1.fep127f, -0.0f};
  const std::vector<std::byte> half = bytes_of({0x3c00, 0xc000, 0x4248, 0x0001, 0x7bff, 0x8000});
  const float expected_half[] = {1.0f, -2.0f, 3.140625f, 0x1p-24f, 65504.0f, -0.0f};
  float found[6];
  widen(Dtype::bfloat16, bfloat, found);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(std::bit_cast<int>(found[i]), std::bit_cast<int>(expected_bfloat[i])) << i;
  widen(Dtype::float16, half, found);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(std::bit_cast<int>(found[i]), std::bit_cast<int>(expected_half[i])) << i;
}

TEST(TraceWords, EveryWordSurvivesWideningAndNarrowing) {
  for (const Dtype dtype : {Dtype::float16, Dtype::bfloat16}) {
    std::vector<std::uint16_t> words(1 << 16);
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint16_t>(i);
    const std::vector<std::byte> bytes = bytes_of(words);
    std::vector<float> values(words.size());
    widen(dtype, bytes, values.data());
    const std::vector<std::byte> back = narrow(dtype, values);
    for (std::size_t i = 0; i < words.size(); ++i) {
      const auto word = std::span(bytes).subspan(2 * i, 2);
      EXPECT_EQ(first_not_finite(dtype, word).has_value(), !std::isfinite(values[i])) << i;
      if (std::isnan(values[i])) continue;
      const float expected = dtype == Dtype::float16
                                 ? static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(words[i]))
                                 : static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(words[i]));
      ASSERT_EQ(std::bit_cast<int>(values[i]), std::bit_cast<int>(expected)) << name_of(dtype) << " word " << i;
      ASSERT_TRUE(back[2 * i] == word[0] && back[2 * i + 1] == word[1]) << name_of(dtype) << " word " << i;
    }
  }
}

TEST(TraceWords, RoundsToNearestEven) {
  const std::vector<float> values{1.00390625f, 1.01171875f, 1.00390637f};  // half way down, half way up, above half way
  EXPECT_EQ(narrow(Dtype::bfloat16, values), bytes_of({0x3f80, 0x3f82, 0x3f81}));
}

TEST(TraceWords, FindsTheFirstBadWord) {
  EXPECT_EQ(first_not_finite(Dtype::bfloat16, bytes_of({0x3f80, 0x7f7f, 0xff80, 0x7fc0})), 2u);
  EXPECT_EQ(first_not_finite(Dtype::float16, bytes_of({0x3f80, 0x7f7f})), 1u);
  const std::vector<float> floats{1, 2, -INFINITY};
  EXPECT_EQ(first_not_finite(Dtype::float32, std::as_bytes(std::span(floats))), 2u);
  EXPECT_FALSE(first_not_finite(Dtype::float32, {}).has_value());
}

TEST(TraceWords, StoredBfloat16WordsAreReadExactly) {
  const test::TempDir dir;
  test::SampleTrace s = test::sample(Dtype::bfloat16);
  s.tensors[0].k[0] = 3.140625f, s.tensors[0].k[1] = -0x1p-133f;
  test::write(dir / "a.h5", s);
  std::vector<std::byte> words;
  h5::File::open(dir / "a.h5").group("layers").group("002").dataset("k").stream([&](auto, auto bytes) {
    words.insert(words.end(), bytes.begin(), bytes.end());
  });
  words.resize(4);
  EXPECT_EQ(words, bytes_of({0x4049, 0x8001}));
  const Trace trace = Trace::open(dir / "a.h5");
  EXPECT_EQ(trace.read_layer(0).k[1], -0x1p-133f);
  std::vector<std::byte> streamed;
  trace.stream(0, "k", [&](auto, auto bytes) { streamed.insert(streamed.end(), bytes.begin(), bytes.end()); });
  EXPECT_EQ(streamed.size(), 2 * s.tensors[0].k.size());
  streamed.resize(4);
  EXPECT_EQ(streamed, words);
  trace.stream(0, "g", [](auto, auto) { ADD_FAILURE() << "was not recorded"; });
}

}  // namespace
}  // namespace kv
