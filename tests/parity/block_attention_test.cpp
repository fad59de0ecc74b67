// The block kernels against float64 on the CPU, over shapes; every launch twice, for equal bits. Skipped without a device.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <memory>

#include "tests/parity/attention_problem.hpp"

namespace kv {
namespace {

/// Relative L2 error of the elements i with i / width % groups == g. NaN counts as infinite.
template <class T>
double relative_error(const std::vector<T>& got, const Doubles& want, int width = 1, int groups = 1, int g = 0) {
  double off = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (static_cast<int>(i / index(width)) % groups != g) continue;
    const double difference = double{got[i]} - want[i];
    off += difference * difference, size += want[i] * want[i];
  }
  if (!std::isfinite(off)) return INFINITY;
  return size == 0 ? std::sqrt(off) : std::sqrt(off / size);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void check(const Problem& problem) {
  const ProblemShape& shape = problem.shape();
  const bool words = shape.elements != Dtype::float32;
  const Expected want = problem.expected();
  const auto output = problem.output(), lse = problem.lse(), sums = problem.sums();
  for (int g = 0; g < shape.group; ++g) {
    EXPECT_LT(relative_error(output, want.output, shape.value_dim, shape.group, g), words ? 2e-5 : 2e-6)
        << "head " << g;
    EXPECT_LT(relative_error(sums, want.sums, 1, shape.group, g), 1e-5) << "sums of head " << g;
  }
  double worst = 0;
  for (std::size_t i = 0; i < want.lse.size(); ++i) {
    if (want.lse[i] == -INFINITY) {
      EXPECT_EQ(lse[i], -INFINITY) << i;
    } else {
      worst = lse[i] == lse[i] ? std::max(worst, std::abs(lse[i] - want.lse[i])) : INFINITY;
    }
  }
  EXPECT_LT(worst, 3e-5) << "log-sum-exp";
  const auto lost = problem.lost();
  for (std::size_t i = 0; i < want.lost.size(); ++i) ASSERT_NEAR(lost[i], want.lost[i], 1e-5) << i;
  if (shape.slots > 1) {  // with one slot v = o, and all that is left is rounding
    EXPECT_LT(relative_error(problem.gradients(), want.gradients), words ? 5e-5 : 1e-5) << "gradients";
  }
}

/// Tasks of one launch. Problems may differ in rows, slots and what they use, not in the common shape.
class Launch {
 public:
  explicit Launch(const std::vector<Problem*>& problems, bool fast = false) {
    const ProblemShape& shape = problems[0]->shape();
    shape_ = {shape.elements, shape.key_dim, shape.value_dim, shape.group, static_cast<float>(scale_of(shape)),
              shape.softcap,  fast};
    for (const Problem* p : problems) {
      tasks_.push_back(p->task()), lost_.push_back(p->lost_task()), gradients_.push_back(p->gradient_task());
      bounds_.rows = std::max(bounds_.rows, p->shape().rows), bounds_.slots = std::max(bounds_.slots, p->shape().slots);
    }
    bounds_.tasks = static_cast<int>(tasks_.size());
  }

  void run() const {
    const Buffer tasks(tasks_);
    const Buffer lost(lost_);
    const Buffer gradients(gradients_);
    block_attention(shape_, tasks.data(), bounds_, nullptr);
    column_masses(shape_, tasks.data(), bounds_, nullptr);
    lost_masses(shape_, lost.data(), bounds_, nullptr);
    if (std::all_of(tasks_.begin(), tasks_.end(), [](const AttentionTask& task) { return task.output; }))
      key_gradients(shape_, gradients.data(), bounds_, nullptr);
    KV_CUDA_TRY(cudaDeviceSynchronize());
  }

 private:
  AttentionShape shape_;
  AttentionBounds bounds_;
  std::vector<AttentionTask> tasks_;
  std::vector<LostMassTask> lost_;
  std::vector<KeyGradientTask> gradients_;
};

bool no_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) != cudaSuccess || count == 0;
}

class BlockAttention : public testing::TestWithParam<ProblemShape> {};

TEST_P(BlockAttention, AgreesWithFloat64AndRepeats) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  Problem problem(GetParam(), 7);
  const Launch launch({&problem});
  problem.spoil();
  launch.run();
  check(problem);
  const auto output = problem.output(), lse = problem.lse(), sums = problem.sums(), gradients = problem.gradients();
  const auto lost = problem.lost();
  problem.spoil();
  launch.run();
  EXPECT_TRUE(same_bits(output, problem.output()) && same_bits(lse, problem.lse()) && same_bits(sums, problem.sums()) &&
              same_bits(lost, problem.lost()) && same_bits(gradients, problem.gradients()));
}

constexpr Dtype bf16 = Dtype::bfloat16, fp16 = Dtype::float16, fp32 = Dtype::float32;

TEST_P(BlockAttention, FastRoundsProbabilitiesOfTheOutputAlone) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  const ProblemShape& shape = GetParam();
  Problem exact(shape, 7), fast(shape, 7);
  exact.spoil(), fast.spoil();
  Launch({&exact}).run();
  Launch({&fast}, true).run();
  EXPECT_TRUE(same_bits(exact.lse(), fast.lse()) && same_bits(exact.sums(), fast.sums()) &&
              same_bits(exact.lost(), fast.lost()));
  const auto output = fast.output();
  const Expected want = fast.expected();
  const double limit = shape.elements == bf16 ? 4e-3 : shape.elements == fp16 ? 5e-4 : 2e-6;  // half a last bit
  for (int g = 0; g < shape.group; ++g)
    EXPECT_LT(relative_error(output, want.output, shape.value_dim, shape.group, g), limit) << "head " << g;
  if (shape.slots > 1) {
    const bool in_words = shape.elements != fp32 && shape.key_dim % 8 == 0 && shape.value_dim % 8 == 0;
    EXPECT_EQ(same_bits(exact.output(), output), !in_words) << "changes what goes over tensor cores, and nothing else";
  }
}

/// Every dim with every element type at one size, then each switch, then sizes around the tiles' edges.
std::vector<ProblemShape> shapes() {
  std::vector<ProblemShape> all;
  for (Dtype type : {bf16, fp16, fp32})
    for (int dim : {6, 16, 64, 80, 96, 128, 256})
      all.push_back({.elements = type,
                     .key_dim = dim,
                     .value_dim = dim,
                     .group = 3,
                     .rows = 70,
                     .slots = 300,
                     .older = 130,
                     .gathers = true});
  for (const auto& [key_dim, value_dim] : {std::pair{64, 128}, {128, 64}, {24, 256}, {200, 72}, {128, 6}, {5, 300}})
    all.push_back({.key_dim = key_dim, .value_dim = value_dim, .rows = 33, .slots = 150, .older = 40});
  for (Dtype type : {bf16, fp16, fp32})
    for (int dim : {64, 128}) {
      const ProblemShape base{
          .elements = type, .key_dim = dim, .value_dim = dim, .rows = 150, .slots = 600, .older = 300};
      const auto with = [&](auto change) {
        ProblemShape shape = base;
        change(shape);
        all.push_back(shape);
      };
      with([](ProblemShape& s) { s.softcap = 8; });
      with([](ProblemShape& s) { s.window = 100, s.older = 0; });
      with([](ProblemShape& s) { s.window = 200; });
      with([](ProblemShape& s) { s.sinks = true; });
      with([](ProblemShape& s) { s.bias = true; });
      with([](ProblemShape& s) { s.hides = true; });
      with([](ProblemShape& s) { s.older = s.slots; });
      with([](ProblemShape& s) { s.e = true; });
      with([](ProblemShape& s) {
        s.softcap = 8, s.window = 170, s.sinks = s.bias = s.hides = s.gathers = s.e = true, s.group = 3;
      });
      with([](ProblemShape& s) { s.hides = true, s.older = 0, s.rows = s.slots = 280; });
      with([](ProblemShape& s) { s.hides = true, s.older = 0, s.window = 20; });  // the last rows see nothing
      with([](ProblemShape& s) { s.hides = s.sinks = true, s.older = 0, s.window = 20; });
    }
  for (Dtype type : {bf16, fp16})
    for (int group : {1, 3, 4, 8})
      for (const auto& [rows, slots] :
           {std::pair{1, 1}, {1, 1000}, {16, 17}, {64, 64}, {129, 128}, {300, 1000}, {300, 300}, {33, 2700}})
        if (type == bf16 || rows == 300)
          all.push_back({.elements = type,
                         .group = group,
                         .rows = rows,
                         .slots = slots,
                         .older = group == 3 ? slots / 2 : 0,
                         .gathers = group == 8});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, BlockAttention, testing::ValuesIn(shapes()), [](const auto& at) {
  const ProblemShape& s = at.param;
  return fmt::format("{}_{}_{}x{}_group{}_rows{}_slots{}_older{}{}{}{}{}{}{}{}", at.index, name_of(s.elements),
                     s.key_dim, s.value_dim, s.group, s.rows, s.slots, s.older, s.softcap > 0 ? "_softcap" : "",
                     s.window > 0 ? "_window" : "", s.sinks ? "_sinks" : "", s.bias ? "_bias" : "",
                     s.hides ? "_hides" : "", s.gathers ? "_gathers" : "", s.e ? "_e" : "");
});

TEST(BlockAttentionTasks, OfDifferentSizesRunTogether) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  for (Dtype type : {bf16, fp32})
    for (int dim : {64, 128}) {
      std::vector<std::unique_ptr<Problem>> problems;
      std::vector<Problem*> all;
      for (int i = 0; i < 11; ++i) {
        ProblemShape shape{
            .elements = type, .key_dim = dim, .value_dim = dim, .rows = 20 + 40 * (i % 5), .slots = 300 + 90 * i};
        shape.older = i % 3 * 100, shape.bias = i % 4 == 1, shape.sinks = i % 4 == 2;
        if (i == 3) shape.rows = 0;
        if (i == 5) shape.slots = 0, shape.older = 0;
        problems.push_back(std::make_unique<Problem>(shape, static_cast<unsigned>(i)));
        problems.back()->spoil();
        all.push_back(problems.back().get());
      }
      Launch(all).run();
      for (std::size_t i = 0; i < all.size(); ++i) {
        SCOPED_TRACE(fmt::format("{} {}, task {}", name_of(type), dim, i));
        check(*all[i]);
      }
    }
}

TEST(BlockAttentionTasks, OfAWindowShareTheirQueriesOverManySlots) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  int multiprocessors = 0;
  KV_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  for (int dim : {64, 72, 128, 256})
    for (int rows : {1, 20, 32, 64}) {
      ProblemShape shape{.key_dim = dim, .value_dim = dim, .group = 3, .rows = rows, .slots = 1000, .older = 900};
      Problem older(shape, 1);
      shape.slots = 700, shape.older = shape.slots - rows, shape.bias = true;
      Problem other(shape, 2);
      std::vector<Problem*> all;  // so many that blocks do several tiles of slots; equal tasks write equal bits
      for (int i = 0; i < 6 * multiprocessors; ++i) all.push_back(i % 3 ? &older : &other);
      older.spoil(), other.spoil();
      Launch(all).run();
      SCOPED_TRACE(fmt::format("{} rows, d {}", rows, dim));
      check(older);
      check(other);
    }
}

TEST(BlockAttentionTasks, OfWindowsAndBlocksOfDifferentSizesShareBlocksOfThreads) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  for (const std::vector<int>& rows : {std::vector{64, 0, 30, 57}, {128, 90, 0, 50}, {140, 1, 300, 0}})
    for (int group : {1, 6}) {  // six heads are more than two tiles of a window
      std::vector<std::unique_ptr<Problem>> problems;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const int slots = 310 + 220 * static_cast<int>(i);
        problems.push_back(std::make_unique<Problem>(
            ProblemShape{.group = group, .rows = rows[i], .slots = slots, .older = slots - rows[i], .bias = i == 2},
            static_cast<unsigned>(i)));
        problems.back()->spoil();
      }
      std::vector<Problem*> all;
      for (std::size_t i = 0; i < 24; ++i) all.push_back(problems[(i + i / 5) % problems.size()].get());
      Launch(all).run();
      for (std::size_t i = 0; i < rows.size(); ++i) {
        SCOPED_TRACE(fmt::format("{} rows, group {}", rows[i], group));
        check(*problems[i]);
      }
    }
}

TEST(BlockAttentionTasks, WithoutOutputGiveTheLogSumExpAlone) {
  if (no_device()) GTEST_SKIP() << "no CUDA device";
  for (Dtype type : {bf16, fp16, fp32})
    for (float bias : {0.f, 1.f, 25.f}) {  // the last beyond what biases may weigh sums with, here and there
      ProblemShape shape{.elements = type, .rows = 200, .slots = 900, .older = 350};
      shape.sinks = shape.bias = bias > 0, shape.bias_size = bias;
      Problem valued(shape, 1), bare(shape, 1);
      bare.lse_only();
      valued.spoil(), bare.spoil();
      Launch({&valued, &bare}).run();
      const auto want = valued.expected().lse;
      const auto lse = bare.lse();
      for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(lse[i], want[i], 3e-5);
      EXPECT_LT(relative_error(bare.sums(), valued.expected().sums), 1e-5);
    }
}

}  // namespace
}  // namespace kv
