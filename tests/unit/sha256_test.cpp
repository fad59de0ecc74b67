#include "core/sha256.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string_view>
#include <vector>

namespace kv {
namespace {

std::string hash_of(std::string_view text, std::size_t piece) {
  Sha256 hash;
  for (std::size_t i = 0; i < text.size(); i += piece) hash.update(std::as_bytes(std::span(text.substr(i, piece))));
  return hash.hex();
}

TEST(Sha256, GivesThePublishedDigests) {
  EXPECT_EQ(hash_of("", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash_of("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hash_of(std::string(1'000'000, 'a'), 1'000'000),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, DoesNotDependOnThePieces) {
  for (std::size_t length : {1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000}) {
    const std::string text(length, 'x');
    for (std::size_t piece : {1, 7, 63, 64, 65}) EXPECT_EQ(hash_of(text, piece), hash_of(text, length)) << length;
  }
}

TEST(Sha256, PortableAndNativeAgree) {
  if (!sha256_detail::has_native()) GTEST_SKIP() << "this CPU has no SHA instructions";
  std::mt19937 random(1);
  std::vector<std::byte> data(64 * 37);
  for (std::byte& byte : data) byte = static_cast<std::byte>(random());
  std::uint32_t a[8] = {1, 2, 3, 4, 5, 6, 7, 8}, b[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  sha256_detail::compress_portable(a, data.data(), 37);
  sha256_detail::compress_native(b, data.data(), 37);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(a[i], b[i]);
}

}  // namespace
}  // namespace kv
