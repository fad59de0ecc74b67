// Chunks decoded by our own threads against what HDF5 was given.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <random>

#include "core/error.hpp"
#include "core/hdf5.hpp"
#include "tests/unit/trace_fixture.hpp"

namespace kv {
namespace {

std::vector<std::byte> random_bytes(std::size_t count) {
  std::mt19937 random(3);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() % 7);  // deflates
  return bytes;
}

std::vector<std::byte> streamed(const h5::Dataset& dataset) {
  std::vector<std::byte> bytes;
  dataset.stream([&](std::uint64_t first, std::span<const std::byte> words) {
    EXPECT_EQ(first * dataset.element_size(), bytes.size());
    bytes.insert(bytes.end(), words.begin(), words.end());
  });
  return bytes;
}

struct Layout {
  h5::Type type;
  std::size_t size;  // bytes of an element
  h5::Shape shape, chunk;
};

TEST(Hdf5Chunks, GiveBackWhatWasWritten) {
  const test::TempDir dir;
  const std::vector<Layout> layouts{
      {h5::Type::bfloat16, 2, {3, 1000, 16}, {1, 256, 16}},   // the last chunk of a head is not full
      {h5::Type::float32, 4, {2, 3, 100, 8}, {1, 1, 64, 8}},  // four axes
      {h5::Type::float16, 2, {5000, 2000}, {500, 2000}},      // a matrix of two slabs
      {h5::Type::float64, 8, {4, 100, 4}, {1, 50, 4}},        // elements that are HDF5's to unshuffle
      {h5::Type::float32, 4, {4, 100, 4}, {2, 50, 2}},        // chunks that are no runs of elements
      {h5::Type::uint8, 1, {100}, {30}}};
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    const Layout& layout = layouts[i];
    SCOPED_TRACE(h5::shape_text(layout.shape));
    std::size_t count = layout.size;
    for (const std::uint64_t extent : layout.shape) count *= extent;
    const std::vector<std::byte> bytes = random_bytes(count);
    const auto file = dir / (std::to_string(i) + ".h5");
    {
      h5::File out = h5::File::create(file);
      out.create("x", layout.type, layout.shape, layout.chunk).write_bytes(bytes);
      out.close();
    }
    EXPECT_TRUE(streamed(h5::File::open(file).dataset("x")) == bytes);
  }
}

TEST(Hdf5Chunks, DamageIsToldAsHdf5Does) {
  const test::TempDir dir;
  {
    h5::File out = h5::File::create(dir / "a.h5");
    out.create("x", h5::Type::bfloat16, {4, 1000, 16}, {1, 1000, 16}).write_bytes(random_bytes(4 * 1000 * 32));
    out.close();
  }
  std::fstream file(dir / "a.h5", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(std::filesystem::file_size(dir / "a.h5")) / 2);
  file.write("damage", 6);
  file.close();
  try {
    streamed(h5::File::open(dir / "a.h5").dataset("x"));
    ADD_FAILURE() << "nothing was noticed";
  } catch (const TraceError& error) {
    EXPECT_NE(std::string(error.what()).find("a.h5: /x: cannot be read"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace kv
