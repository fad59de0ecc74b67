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

/// An array that steps read: its bytes for a slot, or for the head; and whether it outlives a step.
struct Record {
  int of_slot, of_head;
  bool lasts;
  KV_HD int bytes(int slots) const { return of_slot * slots + of_head; }
};

/// Calls f(record, where the unit keeps it) for what steps of this policy read, what matters most first. `unit` may be null to
/// learn the sizes.
template <class P, class F>
KV_HD void for_each_record(const Traits& traits, const PlaySettings& settings, int key_dim, Unit* unit, F f) {
  const bool merges = detail::declares_on_merge<P> && traits.merges, places = !goes_without_places<P>(traits, settings);
  const auto give = [&](Record record, auto Unit::*member) {
    f(record, unit ? reinterpret_cast<void**>(&(unit->*member)) : nullptr);
  };
  const auto of_slots = [&](auto Unit::*member, bool lasts = true) { give({4, 0, lasts}, member); };
  if (traits.key_probe) give({0, key_dim * 4, true}, &Unit::vector);
  if (!std::is_empty_v<typename P::HeadState>)
    give({0, static_cast<int>(sizeof(typename P::HeadState)), true}, &Unit::head_state);
  if (!std::is_empty_v<typename P::Slot>) give({static_cast<int>(sizeof(typename P::Slot)), 0, true}, &Unit::state);
  of_slots(&Unit::token);
  if (traits.key_probe) of_slots(&Unit::probe, false);
  if (detail::declares_log_bias<P>) of_slots(&Unit::bias, false);
  if (places) of_slots(&Unit::rank), of_slots(&Unit::order);
  if (merges) give({1, 0, true}, &Unit::stays);
  if (merges || detail::declares_log_bias<P>) of_slots(&Unit::multiplicity);
}

/// The same for what a compression works with, in the place of a row's logits: all have looked at these by then, unless they are
/// what a window has seen.
template <class P, class F>
__device__ void for_each_working_record(const Traits& traits, Unit& unit, F f) {
  const auto give = [&](int of_slot, auto Unit::*member) {
    f(Record{of_slot, 0, false}, reinterpret_cast<void**>(&(unit.*member)));
  };
  if (traits.observation_window > 0) return;
  if (detail::declares_on_compress<P>) give(4, &Unit::score);  // the first: Player::forget_scores
  if (detail::declares_on_merge<P>) give(4, &Unit::target);
  if (!std::is_empty_v<typename P::Scratch>) give(static_cast<int>(sizeof(typename P::Scratch)), &Unit::scratch);
  if (traits.nearest != Nearest::none) give(4, &Unit::similarity);
}

/// Bytes of shared memory that the records of `slots` slots, and a row's logits if anybody asks, would take.
template <class P>
std::size_t record_bytes(const Traits& traits, const PlaySettings& settings, int group, int key_dim, int slots) {
  int bytes = keeps_logits<P>(traits, settings) ? logit_stride(slots) * group * 4 : 0;
  for_each_record<P>(traits, settings, key_dim, nullptr,
                     [&](Record record, void**) { bytes += (record.bytes(slots) + 15) / 16 * 16; });
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
    const int logit_bytes = fixed.trace.group * logit_stride(slots) * 4;
    if (keeps_logits<P>(traits, fixed.settings) && take(at, logit_bytes)) {
      if (threadIdx.x == 0) fixed.logits = reinterpret_cast<float*>(at), fixed.logit_stride = logit_stride(slots);
      char* const end = at + logit_bytes;
      for_each_working_record<P>(traits, fixed.unit, [&](Record record, void** array) {
        if (at + record.bytes(slots) > end) return;
        if (threadIdx.x == 0) *array = at;
        at += (record.bytes(slots) + 15) / 16 * 16;
      });
    }
    int i = 0;
    for_each_record<P>(traits_, fixed_.settings, fixed_.trace.key_dim, &fixed_.unit, [&](Record record, void** array) {
      void* const home = *array;
      const bool moves = take(at, record.bytes(slots_));
      if (moves && record.lasts) copy(at, home, record.bytes(fixed_.progress.size));
      __syncthreads();
      if (threadIdx.x == 0) fixed_.home[i] = moves && record.lasts ? home : nullptr, *array = moves ? at : home;
      ++i;
    });
    __syncthreads();
  }

  /// Back to where the unit keeps them. Needs a barrier before.
  __device__ void give_back(int size) const {
    int i = 0;
    for_each_record<P>(traits_, fixed_.settings, fixed_.trace.key_dim, &fixed_.unit, [&](Record record, void** array) {
      if (fixed_.home[i]) copy(fixed_.home[i], *array, record.bytes(size));
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
