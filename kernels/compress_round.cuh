// A round of a compression: from candidates to a smaller cache. The end of player.cuh.
#pragma once
#include "kernels/player.cuh"

namespace kv {

/// Player::compress().
template <class P, bool plain>
__device__ __noinline__ void Player<P, plain>::compress_copy(Player& p, int buffer, int window_rows) {
  const Unit& unit = p.unit;
  const BlockTeam team = p.team;
  const Traits traits = p.traits();
  Head h = p.head(window_rows);
  const DeviceCandidates c = decisive(p, traits.scope == Scope::layer, buffer);
  constexpr bool folds = detail::declares_on_merge<P>, evicts_by_hook = detail::declares_on_evict<P>;
  int gone;
  if (traits.select == Select::links) {
    select_links(p, c, traits, unit.work[0], unit.work[1]);
    gone = mark_slots(p, unit.work[0]);
    link_targets(p, traits.picks);
  } else {
    gone = select_slots(p, c, unit.work[0]);
    if (folds || evicts_by_hook || detail::declares_on_selected<P>)  // who may look at targets
      team.for_each(p.size, [&](int s) { unit.target[s] = -1; });
  }
  __syncthreads();
  if constexpr (detail::declares_on_merge<P>)
    if (traits.nearest != Nearest::none) find_nearest(p, h);
  if constexpr (detail::declares_on_selected<P>) {
    p.policy.on_selected(team, h);
    __syncthreads();
  }
  int* going = unit.work[0];  // victims in token order, where somebody asks for them
  if (folds || evicts_by_hook || gone == 1) {
    gone = team.number(
        p.size, [&](int i) { return p.place(i, false); },
        [&](int, const Place& goes, int before) {
          if (goes) going[before] = goes.slot;
        });
    __syncthreads();
  }
  bool merged = false;
  if constexpr (detail::declares_on_merge<P>) {
    merged = traits.merges;
    if (merged && traits.one_at_a_time && gone > 1) return p.one_by_one(c, going, gone);
    if (merged && gone == 1)
      p.fold_apart(going[0], -1, window_rows);
    else if (merged)
      fold_many(p, h, going, gone);
  }
  if (!merged) {
    if (threadIdx.x == 0) p.progress.evictions += gone;
    if (traits.select == Select::links) count_as_if_merged(p, traits.clip);
  }
  p.drop(going, gone);
}

/// The victims one by one, the lowest score first, each plan seeing the folds before it. Slots move: tokens do not.
template <class P, bool plain>
__device__ void Player<P, plain>::one_by_one(const DeviceCandidates& c, const int* going, int gone) {
  int* tokens = unit.work[4];
  const auto key_of = [&](int i) {
    const int place = unit.rank[going[i]];
    if (c.safety[place] != safety_normal) return 1ull << 63 | static_cast<unsigned long long>(place);
    return static_cast<unsigned long long>(Cut::key_of(c.score[place])) << 31 |
           static_cast<unsigned long long>(0x7fffffff - place);
  };
  unsigned long long last = 0;
  for (int i = 0; i < gone; ++i) {
    unsigned long long mine = ~0ull;
    team.for_each(gone, [&](int j) {
      const unsigned long long key = key_of(j) + 1;  // from 1, so that 0 is before all
      if (key > last && key < mine) mine = key;
    });
    last = team.min_key(mine);
    team.for_each(gone, [&](int j) {
      if (key_of(j) + 1 == last) tokens[i] = unit.token[going[j]];
    });
  }
  __syncthreads();
  for (int i = 0; i < gone; ++i) {
    const int victim = slot_of_query(tokens[i], size);
    __syncthreads();
    if constexpr (detail::declares_on_merge<P>) {
      fold_apart(victim, -1);
    }
    drop_one(victim);
  }
}

}  // namespace kv
