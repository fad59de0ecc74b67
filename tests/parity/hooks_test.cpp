// Every policy's hooks on the GPU give the CPU's answers, to the bit, for equal inputs. Skipped without a device.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

#include "kernels/device_hooks.hpp"

namespace kv {
namespace {

struct Shape {
  int slots, group, dim;
};

/// A head with every third token gone from a longer sequence, its slots in shuffled places.
HookInputs random_inputs(const Shape& shape, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const auto n = static_cast<std::size_t>(shape.slots), d = static_cast<std::size_t>(shape.dim),
             g = static_cast<std::size_t>(shape.group);
  HookInputs in;
  in.head = {5, 1, shape.group, shape.dim, shape.dim, std::max(1, shape.slots / 2), shape.slots, 7};
  in.keys.resize(n * d), in.values.resize(n * d), in.sums.resize(n * g);
  for (auto* rows : {&in.keys, &in.values}) std::generate(rows->begin(), rows->end(), [&] { return normal(random); });
  for (float& mass : in.sums) mass = std::abs(normal(random));
  in.token.resize(n), in.order.resize(n), in.rank.resize(n), in.multiplicity.assign(n, 1);
  std::iota(in.order.begin(), in.order.end(), 0);
  std::shuffle(in.order.begin(), in.order.end(), random);
  for (std::size_t i = 0; i < n; ++i) {
    const auto slot = static_cast<std::size_t>(in.order[i]);
    in.rank[slot] = static_cast<int>(i), in.token[slot] = static_cast<int>(i + i / 2);
  }
  in.moment = {in.token[static_cast<std::size_t>(in.order.back())], Phase::prompt, 0};
  in.rows = 3;
  in.kept.assign(n, 1);
  for (std::size_t s = 0; s < n; s += 3) in.kept[s] = 0;
  return in;
}

HookOutputs run_on_cpu(const PolicyEntry& entry, const HookInputs& in) {
  const auto n = static_cast<std::size_t>(in.slots());
  const auto policy = entry.make();
  const auto program = policy->bind(in.head);
  Cache cache(in.head.key_dim, in.head.value_dim, in.moment.now + 1, in.slots());
  // The cache numbers slots by arrival; the device's places are translated.
  for (const int slot : in.order)
    cache.append(in.token[static_cast<std::size_t>(slot)], in.keys.data() + slot * in.head.key_dim,
                 in.values.data() + slot * in.head.value_dim);
  std::vector<float> sums;
  std::vector<std::uint8_t> kept;
  for (const int slot : in.order) {
    sums.insert(sums.end(), in.sums.begin() + slot * in.head.group, in.sums.begin() + (slot + 1) * in.head.group);
    kept.push_back(in.kept[static_cast<std::size_t>(slot)]);
  }
  const Observation seen{sums.data(), in.rows, in.head.group};
  program->append(cache, in.moment, 0);
  program->observe(cache, in.moment, seen);
  std::vector<float> score(n);
  program->score(cache, in.moment, policy->traits().observation_window > 0 ? seen : Observation{}, score);
  HookOutputs out{std::vector<float>(n), std::vector<Fold>(n)};
  for (std::size_t i = 0; i < n; ++i) {
    const auto slot = static_cast<std::size_t>(in.order[i]);
    out.score[slot] = score[i];
    if (kept[i] || !entry.merges) continue;
    out.folds[slot] = program->merge(cache, in.moment, kept, static_cast<int>(i));
    if (out.folds[slot].target >= 0)
      out.folds[slot].target = in.order[static_cast<std::size_t>(out.folds[slot].target)];
  }
  return out;
}

bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

class HookParity : public testing::TestWithParam<std::string> {};

TEST_P(HookParity, TheGpuAnswersAsTheCpu) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  const PolicyEntry& entry = find_policy(GetParam());
  const bool in_order =
      entry.make()->traits().key_probe;  // sums over appended rows: the order of arrival is part of the input
  for (const Shape shape :
       {Shape{1, 1, 64}, {31, 3, 64}, {33, 4, 80}, {127, 8, 96}, {257, 1, 128}, {1000, 3, 128}, {300, 2, 6}}) {
    SCOPED_TRACE(fmt::format("{} slots, group {}, d {}", shape.slots, shape.group, shape.dim));
    HookInputs in = random_inputs(shape, 11);
    if (in_order) {
      std::iota(in.order.begin(), in.order.end(), 0), std::iota(in.rank.begin(), in.rank.end(), 0);
      for (int s = 0; s < in.slots(); ++s) in.token[static_cast<std::size_t>(s)] = s + s / 2;
    }
    const HookOutputs cpu = run_on_cpu(entry, in), gpu = run_hooks_on_device(GetParam(), in),
                      again = run_hooks_on_device(GetParam(), in);
    for (std::size_t s = 0; s < cpu.score.size(); ++s) {
      ASSERT_TRUE(same_bits(cpu.score[s], gpu.score[s]))
          << "slot " << s << ": " << cpu.score[s] << " and " << gpu.score[s];
      ASSERT_TRUE(same_bits(gpu.score[s], again.score[s])) << "slot " << s << " does not repeat";
      ASSERT_EQ(cpu.folds[s].target, gpu.folds[s].target) << "slot " << s;
      ASSERT_TRUE(same_bits(cpu.folds[s].value, gpu.folds[s].value) &&
                  same_bits(cpu.folds[s].own_value, gpu.folds[s].own_value));
    }
  }
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const PolicyEntry& entry : policies()) all.emplace_back(entry.doc.name);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Catalogue, HookParity, testing::ValuesIn(names()),
                         [](const auto& policy) { return policy.param; });

}  // namespace
}  // namespace kv
