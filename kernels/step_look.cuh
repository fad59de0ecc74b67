// What the row of a step looks at, and what has to be known before anyone attends.
//
// Most rows are plain: of bfloat16, over tensor cores, keys at their own positions, logits neither bent nor hidden, and masses
// are not asked for. Kernels for plain rows are compiled apart: less code, in which tensor cores wait for less.
#pragma once
#include "kernels/stages.cuh"
#include "kernels/step_inputs.cuh"

namespace kv {

/// The time of phases in launches that clock them. A clock starts anew; a phase ends, which gives a barrier.
__device__ __noinline__ inline void start_phase_clock(Fixed& fixed) {
  if (threadIdx.x == 0) fixed.clock = clock64();
}
__device__ __noinline__ inline void stop_phase_clock(Fixed& fixed, int index) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  const long long now = clock64();
  fixed.unit.clocks[index] += static_cast<unsigned>(now - fixed.clock);
  fixed.clock = now;
}

/// `width`: of the streams, where rows are plain; 0 for any rows.
template <class P, int width>
class StepLook : protected Stages<P, (width > 0)> {
  using Base = Stages<P, (width > 0)>;

 public:
  using Base::size;
  static constexpr bool plain = width > 0, biased = detail::declares_log_bias<P>;
  /// Whether a fold asks for the whole block.
  static constexpr bool folds_together = detail::declares_on_merge<P> && !leaves_in_fold<P>;
  /// Whether warps that stream may decide who goes while the others measure: where hooks look at slots, or at rows when a slot
  /// comes or goes, or joins another.
  static constexpr bool may_part = plain && !biased && !folds_together && !detail::declares_on_compress<P> &&
                                   !detail::declares_on_selected<P> &&
                                   !(detail::declares_on_attention<P> && detail::declares_score_in<P>);
  /// Hooks of rows, which the next row waits for: the clerk's warp has them to do, and the others measure and fetch.
  static constexpr bool has_row_hooks = detail::declares_on_append<P> || detail::declares_on_evict<P>;
  static constexpr int first_server = stream_warps + (may_part && has_row_hooks ? 1 : 0);
  /// Warps that measure, and which of them a warp is: the clerk's has most to do besides, and is the last, if it is one.
  static constexpr int measurers = team_warps - first_server;
  __device__ int measurer() const {
    return p_.is_clerk_warp() ? team_warps - stream_warps - 1 : p_.warp - stream_warps - 1;
  }
  /// The warp that has to do with the newest token's key and value: its logits, and where they are written to memory.
  static constexpr int row_writer = team_warps - 1;

  using Base::Base;

 protected:
  using Base::add_statistics;
  using Base::args_;
  using Base::p_;
  using Base::watches;

  __device__ bool merges() const { return detail::declares_on_merge<P> && p_.traits().merges; }
  __device__ bool streams_now() const { return p_.warp < stream_warps; }
  __device__ bool streamed() const { return plain || p_.fixed.streamed; }
  __device__ bool absolute() const { return plain || p_.absolute(); }
  __device__ bool asks_for_mass() const { return !plain && p_.settings.mass; }
  __device__ bool future_mass() const { return !plain && p_.traits().future_mass; }
  __device__ int stream_width() const { return plain ? width : kv::stream_width(p_.trace.key_dim, p_.trace.value_dim); }
  __device__ StepInputs inputs() const {
    return {p_, args_.trace, args_.settings, streamed(), stream_width(), absolute()};
  }
  __device__ TokenAttention attention() const {
    TokenAttention attention = p_.attention();
    if constexpr (plain) attention.elements = Dtype::bfloat16, attention.simple = !biased;
    return attention;
  }

  __device__ void begin_step(int token) {
    p_.now = token, p_.block_first = token, p_.block = args_.block + token - args_.first;
    p_.phase = token < args_.trace.prompt_tokens ? Phase::prompt : Phase::decode;
  }

  /// Whether the policy's key probe goes along with a step's row: only where the keys that are attended are those that hooks
  /// see.
  __device__ bool probes(bool due) const { return p_.traits().key_probe && due && absolute(); }

  /// What has to be known before anyone attends, when it is not the same from step to step. `looks`: fixed.look is set anew.
  /// Not inlined, and of few words. Gives a barrier; where policies bias, needs one before. `ring`: the step's, which rows beside
  /// its own may take; null where rows are plain and there are none.
  static __device__ __noinline__ void prepare(const Launch& args, Fixed& fixed, const P& policy, int size, int token,
                                              bool attends, bool due, bool looks, Ring* ring) {
    StepLook s(args, fixed, policy);
    auto& p = s.p_;
    p.size = size;
    if constexpr (!plain) p.ring = *ring;
    s.begin_step(token);
    const bool biases = biased && attends && !looks;  // of slots that are there, while the newest is booked
    const int last = size - 1;
    if (p.is_clerk_warp()) {
      const void *key = s.inputs().key(token), *value = s.inputs().value(token);
      p.write_rows_of(last, key, value);
      p.append_one(token, key, value);
      if (copies_boxes) written_to_device();  // that row; later ones by who writes them
      if (attends && s.streamed() && (s.probes(due) || (plain && p.traits().key_probe))) s.place_probe(token);
      if (biases && p.is_clerk()) p.fill_biases(last, size, 0, 1);
    } else if (biases) {
      const int others = team_threads - 32, thread = static_cast<int>(threadIdx.x);
      p.fill_biases(0, last, p.warp < stream_warps ? thread : thread - 32, others);
    }
    __syncthreads();
    if (s.watches()) s.add_statistics(token, token + 1);
    if constexpr (!plain) *ring = p.ring;
    if (!attends) return;
    if (looks) s.look(token, 0x7fffffff, due);
    if (!s.streamed() || (s.absolute() && !s.future_mass())) return;
    stage_queries(fixed.look, p.queries_of(token), p.row.queries[token & 1], p.row.query_rows);
    __syncthreads();
  }

  /// The policy's vector to where the stream of a token's row finds it; by one warp.
  __device__ void place_probe(int token) const {
    const auto place = [&]<class Element, int of>() {
      kv::place_probe<Element, of>(p_.row.stream.probe, p_.unit.vector, p_.trace.key_dim, token);
    };
    const bool half = p_.trace.elements == Dtype::float16, wide = stream_width() > 64;
    if constexpr (plain)
      place.template operator()<__nv_bfloat16, width>();
    else if (wide)
      half ? place.template operator()<__half, 128>() : place.template operator()<__nv_bfloat16, 128>();
    else
      half ? place.template operator()<__half, 64>() : place.template operator()<__nv_bfloat16, 64>();
  }

  /// Sets what one token's queries look at. With `scores` the policy's key probe may go along.
  __device__ void look(int token, int newest_key, bool scores) {
    bias_ = p_.biases(p_.size);
    p_.look_at(token, bias_, newest_key, probes(scores) ? p_.unit.probe : nullptr);
    p_.probe_known = p_.probe_known || probes(scores);
  }

  const float* bias_ = nullptr;
};

}  // namespace kv
