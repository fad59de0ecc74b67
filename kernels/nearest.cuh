// Each victim's most similar kept slot: HeadReplay::find_nearest by a thread block.
#pragma once
#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

namespace detail {
/// By one thread, in RowTeam's order. Called from several places, inlined in none: unrolled it is long.
__device__ __noinline__ inline float row_dot(DeviceRow a, DeviceRow b) { return RowTeam{}.dot(a, b); }
}  // namespace detail

/// Every victim's most similar kept slot that receives: target[slot] and similarity[slot], of equals the older. Gives a
/// barrier.
template <class Player, class Head>
__device__ __noinline__ void find_nearest(Player& player, Head& head) {
  const Unit& unit = player.unit;
  const BlockTeam team = player.team;
  const int n = player.size;
  const bool cosine = player.traits().nearest == Nearest::cosine;
  int* receiving = unit.work[2];  // slots in token order
  float* norm = unit.norm;        // by slot
  team.for_each(n, [&](int s) {
    const float length = cosine ? std::sqrt(detail::row_dot(head.key(s), head.key(s))) : 1.f;
    norm[s] = length > 0 ? length : 1.f;
    unit.similarity[s] = 0;
  });
  __syncthreads();
  const auto receives = [&](int i) {
    const int slot = unit.order[i];
    if (!unit.stays[slot]) return false;
    if constexpr (detail::declares_receives<typename Player::PolicyType>)
      return player.policy.receives(player.view(slot));
    else
      return true;
  };
  const int receivers = team.number(n, receives, [&](int i, bool is_receiver, int before) {
    if (is_receiver) receiving[before] = unit.order[i];
  });
  __syncthreads();
  if (receivers == 0) return;
  const auto nearest_of = [&](int victim, int first, int step,
                              float& best) {  // among receivers first, first + step, ...
    int at = -1;
    for (int i = first; i < receivers; i += step) {
      const int slot = receiving[i];
      const float dot = detail::row_dot(head.key(victim), head.key(slot)) / (norm[victim] * norm[slot]);
      if (at < 0 || dot > best) best = dot, at = i;
    }
    return at;
  };
  const auto keep = [&](int victim, int at, float best) {
    unit.target[victim] = receiving[at];
    unit.similarity[victim] = cosine ? fminf(fmaxf(best, -1.f), 1.f) : best;
  };
  const int gone = team.count(n, [&](int i) { return unit.stays[unit.order[i]] == 0; });
  if (gone >= team_threads) {  // a victim a thread
    team.for_each(n, [&](int i) {
      const int victim = unit.order[i];
      if (unit.stays[victim]) return;
      float best = 0;
      const int at = nearest_of(victim, 0, 1, best);
      keep(victim, at, best);
    });
    __syncthreads();
    return;
  }
  for (int i = 0; i < n; ++i) {  // all threads on a victim
    const int victim = unit.order[i];
    if (unit.stays[victim]) continue;
    float best = 0;
    const int at = nearest_of(victim, static_cast<int>(threadIdx.x), team_threads, best);
    const unsigned long long key =
        at < 0 ? ~0ull : static_cast<unsigned long long>(~Cut::key_of(best)) << 32 | static_cast<unsigned>(at);
    const unsigned long long least = team.min_key(key);
    if (key == least) keep(victim, at, best);
    __syncthreads();
  }
}

/// The same of one victim, while all others stay: what the books say of the victim itself is not looked at. Needs a barrier
/// before; the clerk, who keeps the result, needs none after.
template <class Player, class Head>
__device__ __forceinline__ void find_nearest_to(Player& player, Head& head, int victim) {
  using P = typename Player::PolicyType;
  const Unit& unit = player.unit;
  const bool cosine = player.traits().nearest == Nearest::cosine;
  unsigned long long nearest = ~0ull;
  int at = -1;
  const auto norm = [&](int slot, auto dot) {
    const float length = cosine ? std::sqrt(dot(head.key(slot), head.key(slot))) : 1.f;
    return length > 0 ? length : 1.f;
  };
  const auto compare = [&](int slot, float own_norm, auto dot, bool keeps) {
    const float similarity = dot(head.key(victim), head.key(slot)) / (own_norm * norm(slot, dot));
    const unsigned long long key =
        static_cast<unsigned long long>(~Cut::key_of(similarity)) << 32 | static_cast<unsigned>(unit.token[slot]);
    if (keeps && key < nearest) nearest = key, at = slot;
  };
  if constexpr (detail::declares_receives<P>) {  // few do: a warp a slot
    const auto dot = [](auto a, auto b) { return WarpRows{}.dot(a, b); };
    const float own_norm = norm(victim, dot);
    const int lane = static_cast<int>(threadIdx.x % 32), n = player.size;
    for (int first = static_cast<int>(threadIdx.x) - lane; first < n; first += team_threads) {
      const int mine = first + lane;
      const bool receives = mine < n && mine != victim && unit.stays[mine] && player.policy.receives(player.view(mine));
      for (unsigned left = __ballot_sync(~0u, receives); left != 0; left &= left - 1)
        compare(first + __ffs(static_cast<int>(left)) - 1, own_norm, dot, lane == 0);
    }
  } else {
    const auto dot = [](DeviceRow a, DeviceRow b) { return detail::row_dot(a, b); };
    const float own_norm = norm(victim, dot);
    player.team.for_each(player.size, [&](int slot) {
      if (slot != victim && unit.stays[slot]) compare(slot, own_norm, dot, true);
    });
  }
  const TeamMemory::Least least = player.team.least(nearest, at, (player.now + 1) & 1);
  if (!player.is_clerk()) return;
  const float best = least.slot >= 0 ? Cut::value_of(~static_cast<unsigned>(least.key >> 32)) : 0.f;
  if (least.slot >= 0) unit.target[victim] = least.slot;
  unit.similarity[victim] = cosine ? fminf(fmaxf(best, -1.f), 1.f) : best;
}

}  // namespace kv
