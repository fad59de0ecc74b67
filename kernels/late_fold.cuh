// A fold of values alone while the next row is under way already: that row sees its target as it was before, and what it lacks is
// added to its outputs when they are measured. After it, rings and memory learn of the value.
#pragma once
#include "kernels/step_look.cuh"

namespace kv {

/// A target's value before and after a fold, [value_dim] each, for the row of a token that sees the former: in the place of outputs,
/// which plain rows leave alone; of tokens in turn. `after` begins as the victim's.
struct LateValue {
  uint4 *before, *after;
  __device__ static LateValue of(const RowMemory& row, int value_dim, int token) {
    uint4* const first = reinterpret_cast<uint4*>(row.output) + (token & 1) * (value_dim / 4);
    return {first, first + value_dim / 8};
  }
};

/// What a head's output lacks of it.
struct LateShare {
  float weight;  // the target's probability; 0 where no fold was late
  LateValue value;
  /// Of four neighbouring channels.
  __device__ void add_to(int c, float4& output) const {
    const float4 before = load_four(value.before, Dtype::bfloat16, c),
                 after = load_four(value.after, Dtype::bfloat16, c);
    const auto add = [&](float& to, float from, float into) {  // where nothing was late these may be no numbers
      const float sum = __fmaf_rn(weight, into - from, to);
      to = weight == 0 ? to : sum;
    };
    add(output.x, before.x, after.x), add(output.y, before.y, after.y);
    add(output.z, before.z, after.z), add(output.w, before.w, after.w);
  }
};
/// The same of rows that no fold is late for.
struct NoLateShare {
  __device__ void add_to(int, float4&) const {}
};

/// A lane's four channels of a victim's value join its target's, `own`: `rows.after` becomes what fold_one() would write.
template <class Player>
__device__ __forceinline__ void fold_late(Player& player, const Fold& plan, int lane, const uint2& own,
                                          const LateValue& rows) {
  const float divisor = plan.own_value + plan.value;
  uint2* const after = reinterpret_cast<uint2*>(rows.after) + lane;
  const float4 into = widen_four(Dtype::bfloat16, own), gone = widen_four(Dtype::bfloat16, *after);
  float to[] = {into.x, into.y, into.z, into.w};
  const float from[] = {gone.x, gone.y, gone.z, gone.w};
  if (!isfinite(divisor) || divisor == 0)
    player.fail(UnitError::bad_divisor, plan.target);
  else if (plan.value != 0 || plan.own_value != divisor) {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = plan.own_value * to[k] + (plan.value != 0 ? plan.value * from[k] : 0.f);
    Quotients(divisor).divide(to);
  }
  reinterpret_cast<uint2*>(rows.before)[lane] = own;
  *after = {narrow_two(Dtype::bfloat16, to[0], to[1]), narrow_two(Dtype::bfloat16, to[2], to[3])};
}

/// The fold of a step that lets one slot go, and what is under way of it.
template <class P, int width, int tile>
class LateFold : protected StepLook<P, width> {
  using Base = StepLook<P, width>;

 public:
  using Base::Base;
  /// Whether a step's fold can wait for the next row.
  static constexpr bool folds_late = Base::may_part && !Base::has_row_hooks && detail::declares_on_attention<P> &&
                                     leaves_in_fold<P> &&
                                     detail::folds_values<P, typename Player<P, Base::plain>::Head>;
  /// Who then has least to do besides: the clerk's warp and the one that folds fetch inputs, of the others, which measure, one closes
  /// the gap and one looks at the newest slot.
  static constexpr int fetchers = folds_late ? 2 : team_warps - Base::first_server;
  static constexpr int gap_closer = Base::row_writer - 2;
  static constexpr int newest_reader = folds_late ? Base::row_writer - 1 : Base::row_writer;

 protected:
  using Base::args_;
  using Base::measurer;
  using Base::p_;
  using Base::row_writer;
  using Base::streams_now;

  /// Which of those that fetch this warp is, or -1. The first warps have more to measure, so the last ones begin.
  __device__ int fetcher() const {
    if (p_.warp < Base::first_server) return -1;
    return !folds_late ? team_warps - 1 - p_.warp : p_.warp == row_writer ? 0 : p_.is_clerk_warp() ? 1 : -1;
  }

  /// As BlockTeam::least, and the slot's value is kept for join(): each warp begins to read that of its own best slot before it is
  /// known whose is the least.
  __device__ __forceinline__ int least_with_value(unsigned long long key, int slot) const {
    uint4 words{};
    const int lane = lane_now(), pieces = value_pieces(), late = p_.row.late;
    const auto best = p_.team.least(key, slot, p_.now & 1, [&](int of_lane) {
      const int mine = __shfl_sync(~0u, slot, of_lane);
      const uint4* const row = mine == late ? late_value(p_.now).after : value_of(mine);
      if (mine >= 0 && lane < pieces) words = row[lane];
    });
    if (best.slot >= 0 && p_.warp == best.warp) {
      if (lane < pieces) late_value(p_.now + 1).after[lane] = words;
      p_.row.stream.gates.arrive(Gate::value_kept);
    }
    return best.slot;
  }
  /// A victim joins its target, for the row to come: by the warp that has to do with new rows. Others pass.
  __device__ __forceinline__ void join(int victim) {
    if (p_.warp != row_writer) return;
    const int lane = lane_now();
    const Fold plan = this->plan(victim, lane);
    p_.row.stream.gates.arrive(Gate::planned), p_.row.stream.gates.arrive(Gate::gap_may_close);
    const bool folds = plan.target >= 0 && lane < 2 * value_pieces();
    uint2 own{};
    if (folds) own = reinterpret_cast<const uint2*>(value_of(plan.target))[lane];
    p_.row.stream.gates.pass(Gate::value_kept);
    if (folds) fold_late(p_, plan, lane, own, late_value(p_.now + 1));
  }
  /// It leaves the order once its target is known, as in Play::close_gap, but by one warp, which only touches tokens that came later:
  /// the last slot is the clerk's to book.
  __device__ __forceinline__ void leave_order(int victim) const {
    constexpr int ahead = 2;
    int *const order = p_.unit.order, *const rank = p_.unit.rank;
    const int lane = lane_now(), last = p_.size - 1, gap = rank[victim];
    p_.row.stream.gates.pass(Gate::gap_may_close);
#pragma unroll 1
    for (int first = gap + 1 + lane; first - lane <= last; first += ahead * 32) {
      int slot[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) slot[k] = order[min(first + 32 * k, last - 1)];
      __syncwarp();
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        const int place = first + 32 * k,
                  theirs = place == last ? victim : slot[k];  // whose place the newest slot takes
        if (place <= last) order[place - 1] = theirs, rank[theirs] = place - 1;
      }
      __syncwarp();
    }
  }

  /// Rings and memory learn of the last fold, before a row that then lacks nothing. All threads; gives a barrier.
  __device__ void land_at_once(int token) const {
    __syncthreads();
    land(token);
    __syncthreads();
    none_is_late();
  }
  /// The same after a row that did not know of it; and what that row's outputs of the heads that this warp measures lack.
  __device__ __forceinline__ void land_after_row() const {
    land(p_.now);
    if (streams_now() || 2 * measurer() >= args_.trace.group) return;
    const int late = p_.row.late, g = min(TokenAttention::head_of_pair(measurer()), args_.trace.group - 1);
    const float logit = p_.fixed.logits[g * p_.fixed.logit_stride + max(late, 0)];
    const float probability = exp2_fast((logit - p_.row.own_log_sum()[g]) * log2_e);
    if (threadIdx.x % 16 == 0) p_.row.late_weight[g] = late < 0 ? 0 : probability;
    __syncwarp();
  }
  /// Of the g-th head's output.
  __device__ LateShare late_share(int g, int token) const { return {p_.row.late_weight[g], late_value(token)}; }
  /// No fold is under way; a barrier before and behind.
  __device__ void none_is_late() const {
    if (p_.is_clerk()) p_.row.late = -1;
  }

 private:
  __device__ static int lane_now() { return static_cast<int>(threadIdx.x % 32); }
  __device__ int value_pieces() const { return args_.trace.value_dim / 8; }
  __device__ uint4* value_of(int slot) const { return static_cast<uint4*>(p_.unit.values) + slot * value_pieces(); }
  __device__ LateValue late_value(int token) const { return LateValue::of(p_.row, args_.trace.value_dim, token); }

  /// Whose value a victim becomes part of; Fixed::plan is it as well.
  __device__ __forceinline__ Fold plan(int victim, int lane) {
    if (lane == 0) p_.unit.stays[victim] = 0;
    __syncwarp();
    auto head = p_.head();
    Fold plan = p_.policy.on_merge(head, victim);
    if (!detail::plan_can_be(p_, plan, victim)) plan.target = -1;
    if (lane == 0) p_.fixed.plan = plan, p_.row.late = plan.target == p_.size - 1 ? victim : plan.target;
    __syncwarp();
    return plan;
  }
  /// The last fold's value to where later rows read it. Needs a barrier before, one must follow.
  __device__ __forceinline__ void land(int token) const {
    const int late = p_.row.late;
    const bool writes = p_.warp == row_writer;
    if (late < 0 || !(writes || p_.streams_slot(late, tile))) return;
    const int lane = lane_now(), pieces = value_pieces();
    const uint4* const row = late_value(token).after;
    if (writes) {
      if (lane < pieces) value_of(late)[lane] = row[lane];
      if constexpr (copies_boxes) written_to_device();
    } else {
      const bool there = lane >= 16 && lane - 16 < pieces;  // the other lanes are of the key
      TileRing::patch(shared_address(p_.row.stream.ring), p_.ring, width, tile, late, there ? row[lane - 16] : uint4{},
                      there);
    }
  }
};

}  // namespace kv
