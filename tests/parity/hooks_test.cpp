// Every policy's hooks on the GPU give the CPU's answers, to the bit, for equal inputs. Skipped without a device.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

#include "kernels/device_hooks.hpp"
#include "tests/parity/variants.hpp"

namespace kv::test {
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
  in.head = {5, 1, shape.group, shape.dim, shape.dim, std::max(1, shape.slots / 2), shape.slots, 7, 0.25f, 0};
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
  in.moment = {in.token[static_cast<std::size_t>(in.order.back())], Phase::decode, 0, 1};
  in.rows = 3;
  std::generate(in.multiplicity.begin(), in.multiplicity.end(), [&] { return 1 + static_cast<int>(random() % 3); });
  in.similarity.resize(n), in.future_mass.resize(n), in.key_gradient.resize(n * d);
  in.query_mean.resize(g * d), in.query_covariance.resize(g * d * d);
  in.output_norm.resize(static_cast<std::size_t>(in.moment.now) + 1);
  for (auto* values :
       {&in.similarity, &in.future_mass, &in.key_gradient, &in.query_mean, &in.query_covariance, &in.output_norm})
    std::generate(values->begin(), values->end(), [&] { return normal(random); });
  return in;
}

/// Every third slot in order goes. Its target is the kept slot before it, as picks fold would have it.
void choose(HookInputs& in) {
  in.kept.assign(in.token.size(), 1), in.target.assign(in.token.size(), -1);
  int last_kept = -1;
  for (std::size_t i = 0; i < in.order.size(); ++i) {
    const auto slot = static_cast<std::size_t>(in.order[i]);
    if (i % 3 == 1) in.kept[slot] = 0, in.target[slot] = last_kept;
    if (in.kept[slot]) last_kept = in.order[i];
  }
}

/// `in` with slots numbered by arrival, as the cache numbers them: slot i is the i-th in token order.
HookInputs in_order(const HookInputs& in) {
  HookInputs out = in;
  const auto gather = [&](auto& to, const auto& from, std::size_t width) {
    for (std::size_t i = 0; i < in.order.size(); ++i)
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(in.order[i]) * width), width,
                  to.begin() + static_cast<std::ptrdiff_t>(i * width));
  };
  const auto d = static_cast<std::size_t>(in.head.key_dim);
  gather(out.keys, in.keys, d), gather(out.values, in.values, d), gather(out.key_gradient, in.key_gradient, d);
  gather(out.sums, in.sums, static_cast<std::size_t>(in.head.group));
  gather(out.token, in.token, 1), gather(out.multiplicity, in.multiplicity, 1), gather(out.kept, in.kept, 1);
  gather(out.similarity, in.similarity, 1), gather(out.future_mass, in.future_mass, 1);
  gather(out.target, in.target, 1);
  for (int& target : out.target)
    if (target >= 0) target = in.rank[static_cast<std::size_t>(target)];
  std::iota(out.order.begin(), out.order.end(), 0), std::iota(out.rank.begin(), out.rank.end(), 0);
  return out;
}

/// The hooks on the CPU, for inputs in order.
HookOutputs run_on_cpu(const PolicyEntry& entry, HookInputs in) {
  const auto n = static_cast<std::size_t>(in.slots());
  const auto policy = make_policy(entry, in.parameters);
  const auto program = policy->bind(in.head);
  Cache cache(in.head.key_dim, in.head.value_dim, in.moment.now + 1, in.slots());
  for (int s = 0; s < in.slots(); ++s) {
    cache.append(in.token[static_cast<std::size_t>(s)], in.keys.data() + s * in.head.key_dim,
                 in.values.data() + s * in.head.value_dim);
    cache.set_multiplicity(s, in.multiplicity[static_cast<std::size_t>(s)]);
  }
  Sight sight{{in.sums.data(), in.rows, in.head.group}};
  sight.similarity = in.similarity.data(), sight.key_gradient = in.key_gradient.data();
  sight.query_mean = in.query_mean.data(), sight.query_covariance = in.query_covariance.data();
  sight.future_mass = in.future_mass.data(), sight.output_norm = in.output_norm.data();
  sight.kept = in.kept.data(), sight.target = in.target.data();
  HookOutputs out{std::vector<float>(n), std::vector<float>(n), std::vector<Fold>(n), {}, std::vector<float>(n)};
  program->append(cache, in.moment, 0);
  program->observe(cache, in.moment, sight);
  program->probe(cache, in.moment, sight);
  program->score(cache, in.moment, sight, out.score);
  program->log_bias(cache, in.moment, out.bias);
  program->selected(cache, in.moment, sight);
  std::vector<float> weights(static_cast<std::size_t>(in.head.key_dim));
  for (int s = 0; s < in.slots(); ++s) {
    const auto i = static_cast<std::size_t>(s);
    if (!in.kept[i] && entry.merges) out.folds[i] = program->merge(cache, in.moment, sight, s);
    FoldTarget sum;
    sum.victims = 1, sum.multiplicity = in.multiplicity[i] + 1;
    sum.key = sum.value = 0.25f, sum.extra = 0.5f, sum.key_divisor = sum.value_divisor = 1.25f;
    program->target(cache, in.moment, sight, s, sum);
    out.sums.push_back(sum);
    program->key_weights(cache, in.moment, sight, s, weights);
    out.weights[i] = weights[0];
  }
  return out;
}

bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

class HookParity : public testing::TestWithParam<std::string> {};

void expect_same(const HookOutputs& cpu, const HookOutputs& gpu, const std::vector<int>& order,
                 const std::vector<int>& rank) {
  for (std::size_t i = 0; i < cpu.score.size(); ++i) {
    const auto s = static_cast<std::size_t>(order[i]);  // the CPU numbers slots in order
    ASSERT_TRUE(same_bits(cpu.score[i], gpu.score[s])) << "slot " << s << ": " << cpu.score[i] << ", " << gpu.score[s];
    ASSERT_TRUE(same_bits(cpu.bias[i], gpu.bias[s])) << "slot " << s << ": bias " << cpu.bias[i] << ", " << gpu.bias[s];
    ASSERT_TRUE(same_bits(cpu.weights[i], gpu.weights[s])) << "slot " << s;
    const Fold &a = cpu.folds[i], &b = gpu.folds[s];
    ASSERT_EQ(a.target, b.target < 0 ? b.target : rank[static_cast<std::size_t>(b.target)]) << "slot " << s;
    ASSERT_EQ(a.spread, b.spread) << "slot " << s;
    for (const auto& [x, y] : {std::pair{a.key, b.key},
                               {a.value, b.value},
                               {a.own_key, b.own_key},
                               {a.own_value, b.own_value},
                               {a.extra, b.extra}})
      ASSERT_TRUE(same_bits(x, y)) << "slot " << s << ": plan " << x << ", " << y;
    const FoldTarget &c = cpu.sums[i], &d = gpu.sums[s];
    for (const auto& [x, y] : {std::pair{c.own_key, d.own_key},
                               {c.own_value, d.own_value},
                               {c.key_divisor, d.key_divisor},
                               {c.value_divisor, d.value_divisor}})
      ASSERT_TRUE(same_bits(x, y)) << "slot " << s << ": target " << x << ", " << y;
  }
}

TEST_P(HookParity, TheGpuAnswersAsTheCpu) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  const PolicyEntry& entry = find_policy(GetParam());
  for (const Parameters& parameters : variants(entry))
    for (const Shape shape :
         {Shape{1, 1, 64}, {31, 3, 64}, {33, 4, 80}, {127, 8, 96}, {257, 1, 128}, {1000, 3, 128}, {300, 2, 6}}) {
      if (!parameters.empty() && shape.slots > 300) continue;  // the largest with the defaults only
      SCOPED_TRACE(fmt::format("{} {}, {} slots, group {}, d {}", parameters.empty() ? "" : parameters[0].first,
                               parameters.empty() ? "" : to_text(parameters[0].second), shape.slots, shape.group,
                               shape.dim));
      HookInputs in = random_inputs(shape, 11);
      in.parameters = parameters;
      choose(in);
      // A vector that rows add to as they come: the order of arrival is part of the input.
      if (entry.make()->traits().key_probe) in = in_order(in);
      const HookOutputs cpu = run_on_cpu(entry, in_order(in)), gpu = run_hooks_on_device(GetParam(), in),
                        again = run_hooks_on_device(GetParam(), in);
      expect_same(cpu, gpu, in.order, in.rank);
      std::vector<int> same(in.token.size());
      std::iota(same.begin(), same.end(), 0);
      expect_same(gpu, again, same, same);
    }
}

INSTANTIATE_TEST_SUITE_P(Catalogue, HookParity, testing::ValuesIn(policy_names()),
                         [](const auto& policy) { return policy.param; });

}  // namespace
}  // namespace kv::test
