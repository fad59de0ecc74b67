// What a step reads of every slot, in shared memory as far as it reaches: the rest stays where it is.
#pragma once
#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

/// Whether nothing in single steps asks for places, so that they can be made again at the end.
template <class P>
KV_HD bool goes_without_places(const Traits& traits, const PlaySettings& settings) {
  return detail::declares_score<P> && !detail::declares_on_append<P> && !detail::declares_on_evict<P> &&
         settings.positions == Positions::absolute && !settings.mass && !traits.future_mass &&
         !(detail::declares_on_merge<P> && traits.merges);
}

/// Whether anybody asks for a row's logits.
template <class P>
KV_HD bool keeps_logits(const Traits& traits, const PlaySettings& settings) {
  return detail::declares_on_attention<P> || traits.observation_window > 0 || settings.mass;
}

/// Calls f(bytes of one slot, where the unit keeps the array, whether it outlives a step) for the arrays of slots that steps of
/// this policy read, what matters most first. `unit` may be null to learn the sizes.
template <class P, class F>
KV_HD void for_each_record(const Traits& traits, const PlaySettings& settings, Unit* unit, F f) {
  const bool merges = detail::declares_on_merge<P> && traits.merges, places = !goes_without_places<P>(traits, settings);
  const auto at = [&](auto Unit::*member) { return unit ? reinterpret_cast<void**>(&(unit->*member)) : nullptr; };
  if (!std::is_empty_v<typename P::Slot>) f(static_cast<int>(sizeof(typename P::Slot)), at(&Unit::state), true);
  f(4, at(&Unit::token), true);
  if (traits.key_probe) f(4, at(&Unit::probe), false);
  if (detail::declares_log_bias<P>) f(4, at(&Unit::bias), false);
  if (places) f(4, at(&Unit::rank), true), f(4, at(&Unit::order), true);
  if (merges) f(1, at(&Unit::stays), true);
  if (merges || detail::declares_log_bias<P>) f(4, at(&Unit::multiplicity), true);
}

/// Bytes of shared memory that the records of `slots` slots, a row's logits if anybody asks, and the policy's key vector would take.
template <class P>
std::size_t record_bytes(const Traits& traits, const PlaySettings& settings, int group, int key_dim, int slots) {
  int bytes = (keeps_logits<P>(traits, settings) ? logit_stride(slots) * group * 4 : 0) + key_dim * 4;
  for_each_record<P>(traits, settings, nullptr,
                     [&](int of_slot, void**, bool) { bytes += (of_slot * slots + 15) / 16 * 16; });
  return static_cast<std::size_t>(bytes);
}

/// The records of a unit for the length of its steps.
template <class P>
class StepRecords {
 public:
  /// Moves what fits into `bytes` of shared memory, for at most `slots` slots. All threads; gives a barrier.
  __device__ StepRecords(Fixed& fixed, const Traits& traits, char* memory, int bytes, int slots)
      : fixed_(fixed), traits_(traits), memory_(memory), left_(bytes), slots_(slots) {
    char* at = memory_;
    if (keeps_logits<P>(traits, fixed.settings) && take(at, fixed.trace.group * logit_stride(slots) * 4) &&
        threadIdx.x == 0)
      fixed.logits = reinterpret_cast<float*>(at), fixed.logit_stride = logit_stride(slots);
    if (threadIdx.x == 0) fixed.home_vector = nullptr;
    if (traits.key_probe && take(at, fixed.trace.key_dim * 4)) {
      float* const vector = fixed.unit.vector;
      for (int i = static_cast<int>(threadIdx.x); i < fixed.trace.key_dim; i += team_threads)
        reinterpret_cast<float*>(at)[i] = vector[i];
      __syncthreads();
      if (threadIdx.x == 0) fixed.home_vector = vector, fixed.unit.vector = reinterpret_cast<float*>(at);
    }
    int i = 0;
    for_each_record<P>(traits_, fixed_.settings, &fixed_.unit, [&](int of_slot, void** array, bool lasts) {
      void* const home = *array;
      const bool moves = take(at, of_slot * slots_);
      if (moves && lasts) copy(at, home, of_slot * fixed_.progress.size);
      __syncthreads();
      if (threadIdx.x == 0) fixed_.home[i] = moves && lasts ? home : nullptr, *array = moves ? at : home;
      ++i;
    });
    __syncthreads();
  }

  /// Back to where the unit keeps them. Needs a barrier before.
  __device__ void give_back(int size) const {
    if (fixed_.home_vector)
      for (int i = static_cast<int>(threadIdx.x); i < fixed_.trace.key_dim; i += team_threads)
        fixed_.home_vector[i] = fixed_.unit.vector[i];
    int i = 0;
    for_each_record<P>(traits_, fixed_.settings, &fixed_.unit, [&](int of_slot, void** array, bool) {
      if (fixed_.home[i]) copy(fixed_.home[i], *array, of_slot * size);
      ++i;
    });
  }

 private:
  __device__ bool take(char*& at, int bytes) {
    bytes = (bytes + 15) / 16 * 16;
    if (bytes > left_) return false;
    at = memory_, memory_ += bytes, left_ -= bytes;
    return true;
  }
  __device__ static void copy(void* to, const void* from, int bytes) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < bytes; i += team_threads)
      static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
  }

  Fixed& fixed_;
  const Traits traits_;
  char* memory_;
  int left_;
  const int slots_;
};

}  // namespace kv
