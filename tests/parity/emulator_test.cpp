// What kernels/emulator finds that a GPU may hide: kernels with one fault each, how much memory the engine takes, and arithmetic
// that has to be right to the bit.
#include <gtest/gtest.h>

#include <bit>
#include <random>
#include <stdexcept>
#include <string>

#include "kernels/emulator/kernels/instructions.cuh"
#include "kernels/emulator/kernels/launch.cuh"
#include "kernels/quotients.cuh"
#include "tests/parity/cases.hpp"
#include "tests/parity/made_trace.hpp"

namespace kv {
namespace {

/// --gtest_random_seed=N draws other turns in every test.
class Turns : public testing::Environment {
  void SetUp() override { emulator::draw_by(static_cast<unsigned>(GTEST_FLAG_GET(random_seed))); }
};
[[maybe_unused]] const auto* const turns = testing::AddGlobalTestEnvironment(new Turns);

/// What a launch throws, or "".
template <class... Parameters, class... Arguments>
std::string error_of(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes,
                     const Arguments&... arguments) {
  try {
    launch(kernel, 1, threads, shared_bytes, nullptr, arguments...);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

/// Every thread copies 16 bytes and reads its neighbour's.
__global__ void copy_and_read(const uint4* from, unsigned* out, bool closes, bool waits, bool meets) {
  char* const memory = launch_memory();
  copy_16(shared_address(memory) + threadIdx.x * 16, from + threadIdx.x);
  if (closes) close_copies();
  if (waits) await_copies<0>();
  if (meets) __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const uint4*>(memory)[(threadIdx.x + 1) % blockDim.x].x;
}

TEST(Emulator, LandsCopiesLateThatNobodyWaitsFor) {
  constexpr unsigned threads = 256;
  std::vector<uint4> numbers(threads);
  for (unsigned i = 0; i < threads; ++i) numbers[i] = {i, i, i, i};
  const Buffer<uint4> from(numbers);
  const Buffer<unsigned> out(threads);
  const auto wrong = [&](bool closes, bool waits, bool meets) {
    launch(copy_and_read, 1, threads, threads * 16, nullptr, from.data(), out.data(), closes, waits, meets);
    const std::vector<unsigned> got = out.to_host();
    unsigned count = 0;
    for (unsigned i = 0; i < threads; ++i) count += got[i] != (i + 1) % threads;
    return count;
  };
  EXPECT_EQ(wrong(true, true, true), 0u);
  EXPECT_GT(wrong(false, true, true), 0u) << "a group that was not closed is not waited for";
  EXPECT_GT(wrong(true, false, true), 0u);
  EXPECT_GT(wrong(true, true, false), 0u);
}

/// A warp copies 16 rows of 64 channels from the 64th channel and 4th row of unit 1 on, and writes them down, row by row.
__global__ void copy_a_box(TileMap map, std::uint16_t* out, bool waits) {
  const char* const memory = launch_memory<1024>();
  const uint32_t tile = shared_address(memory), barrier = tile + 2048;
  if (threadIdx.x == 0) barrier_init(barrier, 1);
  __syncwarp();
  if (is_elected()) {
    barrier_expect(barrier, 2048);
    copy_box(tile, &map, 64, 4, 1, barrier, stay_as_usual);
  }
  __syncwarp();
  if (waits) barrier_wait(barrier, 0);
  for (unsigned i = threadIdx.x; i < 1024; i += 32) {
    const unsigned row = i / 64, channel = i % 64;
    out[i] = reinterpret_cast<const std::uint16_t*>(memory + row * 128 + (channel / 8 ^ row % 8) * 16)[channel % 8];
  }
}

TEST(Emulator, CopiesBoxesSwizzledAndFindsWhoForgetsThem) {
  constexpr int dim = 80, rows = 10;
  std::vector<std::uint16_t> numbers(2 * rows * dim);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::uint16_t>(i + 1);
  const Buffer<std::uint16_t> from(numbers), out(1024);
  const TileMap map = make_tile_map(from.data(), dim, rows, rows * dim * 2, 2, 16);
  launch(copy_a_box, 1, 32, 2048 + 8, nullptr, map, out.data(), true);
  const std::vector<std::uint16_t> got = out.to_host();
  for (int row = 0; row < 16; ++row)
    for (int channel = 0; channel < 64; ++channel) {
      const bool there = row + 4 < rows && channel + 64 < dim;  // else zeros
      const int expected = there ? numbers[static_cast<std::size_t>((rows + row + 4) * dim + channel + 64)] : 0;
      ASSERT_EQ(got[static_cast<std::size_t>(row * 64 + channel)], expected) << row << ", " << channel;
    }
  try {
    launch(copy_a_box, 16, 32, 2048 + 8, nullptr, map, out.data(), false);
    ADD_FAILURE() << "nobody waited";
  } catch (const std::logic_error& error) {
    EXPECT_STREQ(error.what(), "emulator: a block ends before its copies");
  }
}

__global__ void half_come() {
  if (threadIdx.x < 32 || threadIdx.x % 2 == 0) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp();
}

TEST(Emulator, SaysWhoWaitsForWhom) {
  const std::string error = error_of(half_come, 64, 0);
  EXPECT_NE(error.find("warp 0: 32 lanes at a barrier"), std::string::npos) << error;
  EXPECT_NE(error.find("warp 1: 16 lanes at a barrier, 16 at __syncwarp"), std::string::npos) << error;
}

/// The first of two warps writes and arrives at a gate, the second one passes it and reads; the last of so many times the first may
/// stay away.
__global__ void pass_a_gate(int* seen, int times, bool stays_away) {
  char* const memory = launch_memory();
  const uint32_t gate = shared_address(memory);
  volatile int* const written = reinterpret_cast<int*>(memory + 16);
  if (threadIdx.x == 0) barrier_init(gate, 64);
  __syncthreads();
  for (int i = 0; i < times; ++i) {
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) *written = i + 1;
      __syncwarp();
      if (!stays_away || i + 1 < times) barrier_arrive(gate);
    } else {
      barrier_arrive_and_wait(gate);
      seen[i * 32 + static_cast<int>(threadIdx.x % 32)] = *written;
    }
    __syncthreads();
  }
}

TEST(Emulator, LetsThroughAGateWhoFollowsAndSaysWhenNobodyComes) {
  constexpr int times = 5;
  const Buffer<int> seen(times * 32);
  EXPECT_EQ(error_of(pass_a_gate, 64, 32, seen.data(), times, false), "");
  const std::vector<int> all = seen.to_host();
  for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], static_cast<int>(i / 32) + 1) << i;
  EXPECT_EQ(error_of(pass_a_gate, 64, 32, seen.data(), times, true), "emulator: all wait for a barrier");
}

/// The blocks of a launch meet as the heads of a layer do, but arrive so many times each; `all`: arrivals that make a meeting.
__global__ void meet(int* arrivals, int times, int all) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < times; ++i) add_release(arrivals, 1);
  while (load_acquire(arrivals) < all) wait_a_moment();
}

TEST(Emulator, CountsBlocksThatArriveAtOnceAndSaysWhenOneNeverComes) {
  const Buffer<int> all_come(std::vector<int>{0}), one_is_missing(std::vector<int>{0});
  launch_together(meet, 4, 32, 0, nullptr, all_come.data(), 1000000, 4000000);
  EXPECT_EQ(all_come.to_host(), std::vector{4000000});
  try {
    launch_together(meet, 3, 32, 0, nullptr, one_is_missing.data(), 1, 4);
    FAIL() << "three of four met";
  } catch (const std::logic_error& error) {
    EXPECT_STREQ(error.what(), "emulator: all wait for another block");
  }
}

__global__ void write_beyond(int chunk) {
  store_shared(shared_address(launch_memory()) + static_cast<unsigned>(chunk) * 16, {});
}

TEST(Emulator, KnowsTheEndOfSharedMemory) {
  EXPECT_EQ(error_of(write_beyond, 32, 64, 3), "");
  EXPECT_NE(error_of(write_beyond, 32, 64, 4), "");
}

__global__ void throws_in_one_thread() {
  if (threadIdx.x == 17) throw std::logic_error("seventeen");
  __syncthreads();
}

TEST(Emulator, HandsErrorsToWhoLaunched) { EXPECT_EQ(error_of(throws_in_one_thread, 64, 0), "seventeen"); }

/// Points that measure other queries: a layer has full attention of every list when they run together.
TEST(Emulator, SeesThatDeviceMemoryIsKeptTo) {
  using namespace test;
  MadeTrace trace(
      "kept-to", {.kv_heads = 1, .group = 8, .head_dim = 16, .value_dim = 256, .tokens = 600, .prompt_tokens = 560}, 3);
  const TraceHeader& header = trace.session().header();
  std::vector<Case> cases;
  for (const char* measure : {"last:595", "last:590", "last:585", "last:580", "last:575", "last:570"}) {
    ReplaySettings settings;
    settings.block = {128}, settings.compress = Compress::prompt;
    settings.measured = parse_measure(measure, header.tokens, header.prompt_tokens);
    cases.push_back(make_case(header, find_policy("streaming_llm"), {}, "64", settings, measure));
  }
  const auto peak = [&](const std::vector<Case>& some, std::size_t memory, std::vector<DeviceOutcome>& outcomes) {
    emulator::most_device_bytes();
    outcomes = replay_together(trace.session(), some, {memory});
    return emulator::most_device_bytes();
  };
  std::vector<DeviceOutcome> together, apart;
  const std::size_t roomy = peak(cases, std::size_t{1} << 30, together);
  std::size_t most = 0;  // that one of them says it needs
  for (const Case& c : cases) {
    const std::string error = test::error_of(replay_together(trace.session(), {c}, {1})[0]);
    const std::string before = "this point take ";
    ASSERT_NE(error.find(before), std::string::npos) << error;
    most =
        std::max(most, static_cast<std::size_t>(std::stod(error.substr(error.find(before) + before.size())) * 1048576));
  }
  most += 1 << 20;
  const std::size_t narrow = peak(cases, most, apart);
  EXPECT_LE(narrow, most);
  EXPECT_GT(roomy, most) << "they would not fit together";
  for (std::size_t i = 0; i < cases.size(); ++i) {
    EXPECT_EQ(test::error_of(apart[i]), "");
    EXPECT_EQ(bit_difference(together[i].result, apart[i].result), "");
  }
}

TEST(Emulator, DividesRowsByReciprocalsToTheBit) {
  std::mt19937 random(GTEST_FLAG_GET(random_seed) + 1u);
  const auto number = [&](unsigned least,
                          unsigned most) {  // of a random sign and exponent; often with a mantissa near a border
    const unsigned exponent = std::uniform_int_distribution<unsigned>(least, most)(random);
    unsigned mantissa = random() & 0x7fffff;
    if (random() % 4 == 0) mantissa = random() % 2 ? mantissa & 3 : 0x7fffff - (mantissa & 3);
    return std::bit_cast<float>(static_cast<unsigned>(random()) << 31 | exponent << 23 | mantissa);
  };
  for (const auto& [least, most] :
       {std::pair{120u, 134u}, {60u, 194u}, {0u, 254u}})  // as folds have them; at the edge; any
    for (int i = 0; i < 300000; ++i) {
      float x[8];
      for (float& each : x) each = random() % 64 ? number(least, most) : 0.f;
      const float divisor = number(std::max(least, 1u), most);
      float quotients[8];
      std::copy_n(x, 8, quotients);
      Quotients(divisor).divide(quotients);
      for (int k = 0; k < 8; ++k)
        ASSERT_EQ(std::bit_cast<unsigned>(quotients[k]), std::bit_cast<unsigned>(x[k] / divisor))
            << x[k] << " / " << divisor;
    }
}

}  // namespace
}  // namespace kv
