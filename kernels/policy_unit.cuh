// What a generated .cu includes before a policy file: KV_REGISTER here makes the policy's kernels and registers them.
#pragma once
#include "kernels/device_hooks.hpp"
#include "kernels/device_program.hpp"

#define KV_REGISTER(Type)                                                                                        \
  static_assert(::kv::detail::check_policy<Type>());                                                             \
  [[maybe_unused]] const bool hooks_##Type = ::kv::register_device_hooks(Type::doc.name, ::kv::run_hooks<Type>); \
  [[maybe_unused]] const bool program_##Type =                                                                   \
      ::kv::register_device_program(Type::doc.name, [](std::span<const ::kv::BoundPolicy* const> points) {       \
        return std::unique_ptr<::kv::DeviceProgram>(std::make_unique<::kv::DeviceProgramOf<Type>>(points));      \
      })

#include "kernels/buffer.hpp"
#include "kernels/column_sums.cuh"
#include "kernels/hook_kernel.cuh"
#include "kernels/play_kernel.cuh"

namespace kv {

/// A window's statistic as column_sums calls it.
template <class P>
struct WindowWeigh {
  static KV_HD float weigh(float probability, float logit, int rows_after) {
    return P::weigh_window(probability, logit, rows_after);
  }
};

template <class P>
class DeviceProgramOf final : public DeviceProgram {
 public:
  explicit DeviceProgramOf(std::span<const BoundPolicy* const> points) : points_(parameters(points)) {}

  std::size_t slot_bytes() const override { return size_of_data<typename P::Slot>(); }
  std::size_t scratch_bytes() const override { return size_of_data<typename P::Scratch>(); }
  std::size_t head_bytes() const override { return size_of_data<typename P::HeadState>(); }

  bool weighs(bool window) const override {
    return detail::declares_weigh<P> || (window && detail::declares_weigh_window<P>);
  }
  void column_sums(const AttentionShape& shape, const AttentionTask* tasks, int count, int rows, int slots, bool window,
                   cudaStream_t stream) const override {
    if constexpr (detail::declares_weigh_window<P>)
      if (window) return kv::column_sums<WindowWeigh<P>>(shape, tasks, {count, rows, slots}, stream);
    if constexpr (detail::declares_weigh<P>) kv::column_sums<P>(shape, tasks, {count, rows, slots}, stream);
    (void)window;
  }

  std::size_t record_bytes(const Traits& traits, const PlaySettings& settings, int group, int key_dim,
                           int slots) const override {
    return kv::record_bytes<P>(traits, settings, group, key_dim, slots);
  }

  void launch(const Launch& launch, int layer_heads, std::size_t shared_bytes, cudaStream_t stream) const override {
    const auto kernel = launch.stage == Stage::steps ? kernel_of_steps(launch) : stage_kernel<P>;
    const auto units = static_cast<unsigned>(launch.unit_count);
    if (!launch.together) return kv::launch(kernel, units, team_threads, shared_bytes, stream, launch, points_.data());
    const int resident = resident_blocks(kernel, team_threads, shared_bytes) / layer_heads * layer_heads;
    if (resident < layer_heads)
      throw CudaError("the heads of a layer do not fit on this GPU at once, as a policy that decides per layer needs");
    launch_together(kernel, std::min(units, static_cast<unsigned>(resident)), team_threads, shared_bytes, stream,
                    launch, points_.data());
  }

 private:
  using Kernel = void (*)(Launch, const P*);
  static Kernel kernel_of_steps(const Launch& launch) {
    if (launch.plain_width == 0) return step_kernel<P, 0, 0>;
    if (launch.plain_width == 64) return step_kernel<P, 64, tile_slots(64, short_ring)>;
    return launch.ring_bytes == long_ring ? step_kernel<P, 128, tile_slots(128, long_ring)>
                                          : step_kernel<P, 128, tile_slots(128, short_ring)>;
  }
  template <class T>
  static std::size_t size_of_data() {
    return std::is_empty_v<T> ? 0 : sizeof(T);
  }
  static std::vector<P> parameters(std::span<const BoundPolicy* const> points) {
    std::vector<P> all;
    for (const BoundPolicy* point : points) {
      P policy;
      const auto values = point->values();
      for (const Field& field : fields_of(policy))
        for (const auto& [name, value] : values)
          if (field.name == name) field.set(value);
      all.push_back(policy);
    }
    return all;
  }

  Buffer<P> points_;
};

}  // namespace kv
