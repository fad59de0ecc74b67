// The row of a step: what it looks at, the warps that stream it and those that serve them, its measure, and the rows that
// attend besides it.
//
// Most rows are plain: of bfloat16, over tensor cores, keys at their own positions, logits neither bent nor hidden, and masses
// are not asked for. Kernels for plain rows are compiled apart: less code, in which tensor cores wait for less.
#pragma once
#include "kernels/stages.cuh"
#include "kernels/step_inputs.cuh"

namespace kv {

/// `width`, `tile`: of the streams, where rows are plain; 0 for any rows.
template <class P, int width, int tile>
class StepRow : protected Stages<P, tile> {
  using Base = Stages<P, tile>;

 public:
  using Base::size;
  static constexpr bool plain = width > 0, biased = detail::declares_log_bias<P>;
  /// Whether warps that stream may decide who goes while the others measure: where slots are all that hooks look at.
  static constexpr bool may_part = plain && !biased && !detail::declares_on_append<P> &&
                                   !detail::declares_on_evict<P> && !detail::declares_on_merge<P> &&
                                   !detail::declares_on_compress<P> && !detail::declares_on_selected<P> &&
                                   !(detail::declares_on_attention<P> && detail::declares_score_in<P>);
  /// How far ahead of a step's end inputs are fetched: where the warps part they are for the step after next.
  static constexpr int fetched_ahead = may_part ? 2 : 1;

  __device__ StepRow(const Launch& launch, Fixed& fixed, const P& policy)
      : Base(launch, fixed, policy),
        prepares_(p_.traits().key_probe || biased ||
                  (!plain && (!p_.fixed.streamed || !p_.absolute() || p_.layer.window > 0 ||
                              p_.traits().future_queries.horizon > 0 || p_.traits().future_mass))) {}

 protected:
  using Base::add_statistics;
  using Base::args_;
  using Base::p_;
  using Base::watches;

  __device__ bool streams_now() const { return p_.warp < stream_warps; }
  __device__ bool streamed() const { return plain || p_.fixed.streamed; }
  __device__ bool absolute() const { return plain || p_.absolute(); }
  __device__ bool asks_for_mass() const { return !plain && p_.settings.mass; }
  __device__ bool future_mass() const { return !plain && p_.traits().future_mass; }
  __device__ int stream_width() const { return plain ? width : kv::stream_width(p_.trace.key_dim, p_.trace.value_dim); }
  __device__ StepInputs inputs() const { return {p_, streamed(), stream_width()}; }
  __device__ TokenAttention attention() const {
    TokenAttention attention = p_.attention();
    if constexpr (plain) attention.elements = Dtype::bfloat16, attention.simple = !biased;
    return attention;
  }

  __device__ void begin() {
    if (streamed()) {  // beyond the group and the dimension queries stay zeros
      const int words = stream_heads * query_pitch(stream_width()) / 2;
      for (int i = static_cast<int>(threadIdx.x); i < words; i += team_threads)
        for (std::uint16_t* buffer : p_.row.queries) reinterpret_cast<unsigned*>(buffer)[i] = 0;
    }
    if (p_.is_clerk())
      for (int token = args_.first; token < args_.first + 2; ++token) fetch_numbers(token);
    close_copies();
    await_copies<0>();
    __syncthreads();
    if (!streams_now())
      for (int token = args_.first; token < min(args_.first + fetched_ahead, args_.last); ++token) fetch(token);
    await_copies<0>();
    if (may_part && !streams_now()) free_parts();
    __syncthreads();
  }
  /// After the last step: takes out what is under way.
  __device__ void end() {
    await_copies<0>();
    if (streamed() && streams_now()) TileRing::drain(p_.row.stream, p_.ring);
    if (may_part && streams_now()) await_parts();
    __syncthreads();
    measure_row();
  }

  __device__ void begin_step(int token, int block) {
    p_.now = token, p_.block_first = token, p_.block = block;
    p_.phase = token < p_.trace.prompt_tokens ? Phase::prompt : Phase::decode;
  }

  /// Whether the policy's key probe goes along with a step's row: only where the keys that are attended are those that hooks
  /// see.
  __device__ bool probes(bool due) const { return p_.traits().key_probe && due && absolute(); }

  /// What has to be known before anyone attends, when it is not the same from step to step. `looks`: fixed.look is set anew.
  /// Not inlined, and of few words. Gives a barrier; where policies bias, needs one before. `ring`: the step's, which rows beside
  /// its own may take; null where rows are plain and there are none.
  static __device__ __noinline__ void prepare(const Launch& args, Fixed& fixed, const P& policy, int size, int token,
                                              int block, bool attends, bool due, bool looks, Ring* ring) {
    StepRow s(args, fixed, policy);
    auto& p = s.p_;
    p.size = size;
    if constexpr (!plain) p.ring = *ring;
    s.begin_step(token, block);
    const bool biases = biased && attends && !looks;  // of slots that are there, while the newest is booked
    const int last = size - 1;
    if (p.is_clerk_warp()) {
      p.append_one(token, s.inputs().key(token), s.inputs().value(token));
      if (attends && s.streamed() && s.probes(due)) s.place_probe(token);
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
    stage_queries(fixed.look, p.queries_of(token), p.row.queries[token & 1]);
    __syncthreads();
  }

  /// The policy's vector to where the stream of a token's row finds it; by one warp.
  __device__ void place_probe(int token) const {
    const int dk = p_.trace.key_dim, dv = p_.trace.value_dim;
    unsigned* const queries = reinterpret_cast<unsigned*>(p_.row.queries[token & 1]);
    if constexpr (plain)
      split_probe<__nv_bfloat16>(p_.unit.vector, dk, dv, queries + p_.trace.group * query_pitch(width) / 2,
                                 Probing::among_queries);
    else if (p_.trace.elements == Dtype::float16)
      split_probe<__half>(p_.unit.vector, dk, dv, p_.row.stream.probe, Probing::apart);
    else
      split_probe<__nv_bfloat16>(p_.unit.vector, dk, dv, p_.row.stream.probe, Probing::apart);
  }

  /// Sets what one token's queries look at. With `scores` the policy's key probe may go along.
  __device__ void look(int token, int newest_key, bool scores) {
    bias_ = p_.biases(p_.size);
    p_.look_at(token, bias_, newest_key, probes(scores) ? p_.unit.probe : nullptr);
    p_.probe_known = p_.probe_known || probes(scores);
  }

  /// The step's row: logits, log-sum-exps, outputs. `appends`: the token is booked meanwhile. Outputs need a
  /// barrier.
  __device__ __forceinline__ void pass(int token, bool appends) {
    row_of_ = token;
    if (!streamed()) {
      if (!streams_now()) serve(token);
      p_.attend_apart(token);
      return;
    }
    const int last = p_.size - 1;
    const RowNow now{last,
                     token,
                     p_.row.queries[token & 1],
                     absolute() ? inputs().key(token) : p_.at(p_.unit.rotated, last, p_.trace.key_dim),
                     inputs().value(token),
                     p_.changed};
    const bool next = absolute() && !asks_for_mass() && !future_mass();
    if (streams_now()) {
      const int stale = detail::declares_on_merge<P> ? p_.stale : -1;  // only folds write rows of slots that stay
      if (stale >= 0 && stale < last && p_.streams_slot(stale, p_.stream_tile()))
        p_.patch(stale, p_.at(p_.unit.keys, stale, p_.trace.key_dim), p_.at(p_.unit.values, stale, p_.trace.value_dim),
                 p_.stream_tile());
      stream(now, next);
    } else {
      if constexpr (plain && !may_part) measure_and_free();
      if (appends && p_.is_clerk_warp()) p_.append_one(token, inputs().key(token), inputs().value(token));
      attention().newest_slot(p_.fixed.look, now, p_.row, p_.warp - stream_warps);
      if constexpr (may_part)
        await_copies<0>();  // the next step's inputs
      else
        serve(token);
    }
    p_.stale = p_.changed = -1;
    TileRing::advance(p_.ring, p_.stream_tile(), last, next);
    __syncthreads();
    if constexpr (plain)
      weights_ = attention().log_sums(p_.fixed.look, p_.row, true);
    else
      attention().combine(p_.fixed.look, now, p_.row);
  }

  /// Plain rows are streamed here, others by a call.
  __device__ __forceinline__ void stream(const RowNow& now, bool next) {
    const RowLook& look = p_.fixed.look;
    StreamMemory& memory = p_.row.stream;
    if constexpr (plain) {
      if (!p_.ring.running) {
        const RowNow copy = now;
        start_apart(look, copy, memory, p_.ring, args_.settings.kept_tiles);
      }
      const auto run = [&](auto probing) __attribute__((always_inline)) {
        const StreamSource from{&args_.maps.keys, &args_.maps.values, p_.fixed.unit_index};
        const int kept_tiles = args_.settings.kept_tiles;
        Stream<__nv_bfloat16, width, tile, probing.value, true, biased> stream(look, now, memory, from, kept_tiles);
        stream.run(p_.ring, next);
        await_parts();
        stream.store();
      };
      if (p_.traits().key_probe && p_.probe_known)
        run(std::integral_constant<Probing, Probing::among_queries>{});
      else
        run(std::integral_constant<Probing, Probing::none>{});
    } else {
      const Ring ring = p_.ring;
      const RowNow copy = now;
      stream_apart(p_.trace.elements, look, copy, memory, ring, next);
    }
  }

  static __device__ __noinline__ void start_apart(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                                  Ring ring, int kept_tiles) {
    Stream<__nv_bfloat16, width, tile, Probing::none, true>(look, now, memory, look.from, kept_tiles).start(ring);
  }

  /// What the warps that do not stream do for steps to come, which must await the copies; and for the one before, unless rows
  /// are plain.
  __device__ void serve(int token) {
    if constexpr (!plain) measure_row();
    fetch_ahead(token);
    if (copies_boxes && p_.is_clerk_warp()) written_to_device();  // the newest row, which a stream may come to next
  }
  __device__ void fetch_ahead(int token) const {
    if (token + fetched_ahead < args_.last) fetch(token + fetched_ahead);
  }
  __device__ void fetch(int token) const {
    const auto& numbers = p_.fixed.coming[token % 4];
    if (streamed()) inputs().fetch(token, numbers.measured, numbers.row, p_.warp - stream_warps);
    if (threadIdx.x == team_threads - 32) fetch_numbers(token + 1);
    close_copies();
  }
  /// Fixed::coming of a token, by one thread.
  __device__ void fetch_numbers(int token) const {
    auto& numbers = p_.fixed.coming[token % 4];
    const int there = min(token, p_.trace.tokens - 1);
    copy_4(shared_address(&numbers.measured), p_.settings.measured_of_token + there, true);
    copy_4(shared_address(&numbers.row), p_.layer.row_of_token + there, true);
  }

  /// Outputs were made of the parts that the last row left: said by warps that serve, awaited by each that streams.
  __device__ void free_parts() const {
#pragma unroll
    for (int warp = 0; warp < stream_warps; ++warp) named_arrive(parts_are_free + warp, 32 + serving_threads);
  }
  __device__ void await_parts() const {
    named_wait(parts_are_free + static_cast<int>(threadIdx.x / 32), 32 + serving_threads);
  }

  /// measure_row() of plain rows, which tells the warps that stream as soon as outputs are made of what they left.
  __device__ __forceinline__ void measure_and_free() {
    constexpr int serving_warps = serving_threads / 32;
    const int first = p_.warp - stream_warps, group = p_.trace.group;
    const auto output_of = [&](int g) __attribute__((always_inline)) {
      return attention().output_of(g, weights_, p_.fixed.look, inputs().value(measured_token_), p_.row);
    };
    const auto full_output = [&](int g) { return inputs().full_output(measured_token_, g, measured_); };
    float4 output{}, other{};
    if (measured_ >= 0 && first < group) output = output_of(first);
    static_assert(stream_heads <= 2 * serving_warps);
    if (measured_ >= 0 && first + serving_warps < group) other = output_of(first + serving_warps);
    free_parts();
    if (measured_ < 0) return;
    if (first < group) compare_here(p_.fixed, first, measured_, measured_token_, output, full_output(first));
    if (first + serving_warps < group)
      compare_plain(p_.fixed, first + serving_warps, measured_, measured_token_, other,
                    full_output(first + serving_warps));
  }

  /// Compares the outputs of the last row that was measured, which is a step back or the present one: heads are dealt over the
  /// warps that do not stream. Plain rows leave parts of them, which may change afterwards.
  __device__ __forceinline__ void measure_row() {
    if (measured_ < 0 || streams_now()) return;
    const int group = p_.trace.group;
#pragma unroll 1
    for (int g = p_.warp - stream_warps; g < group; g += team_warps - stream_warps) {
      const float* const full_output = inputs().full_output(measured_token_, g, measured_);
      if constexpr (plain)
        compare_plain(p_.fixed, g, measured_, measured_token_,
                      attention().output_of(g, weights_, p_.fixed.look, inputs().value(measured_token_), p_.row),
                      full_output);
      else
        measure_head(p_.fixed, g, measured_, measured_token_, p_.row.output + g * p_.trace.value_dim, full_output,
                     static_cast<double>(p_.row.log_sum[g]));
    }
  }
  /// A plain row's output of head g, four channels a lane.
  static __device__ __noinline__ void compare_plain(Fixed& fixed, int g, int m, int token, float4 output,
                                                    const float* full_output) {
    compare_here(by_kept_address(fixed), g, m, token, output, full_output);
  }
  static __device__ __forceinline__ void compare_here(Fixed& f, int g, int m, int token, float4 output,
                                                      const float* full_output) {
    const int c = 4 * static_cast<int>(threadIdx.x % 32), dv = f.trace.value_dim;
    OutputSums sums;
    if (c < dv) {
      const float4 full = *reinterpret_cast<const float4*>(full_output + c);
      sums.add(output.x, full.x), sums.add(output.y, full.y), sums.add(output.z, full.z), sums.add(output.w, full.w);
      if (f.unit.delta)
        *reinterpret_cast<float4*>(f.unit.delta + (static_cast<long>(m) * f.trace.group + g) * dv + c) = {
            output.x - full.x, output.y - full.y, output.z - full.z, output.w - full.w};
    }
    keep_sums(f.unit, f.progress, f.unit.info.kv_head * f.trace.group + g, token,
              static_cast<long>(g) * f.settings.measured_count + m, sums,
              static_cast<double>(TokenAttention::log_sum_of(f.row.whole[g])));
  }

  /// measure_row() now, before something else attends. Gives a barrier when it has to.
  __device__ void settle_measure() {
    if (measured_ < 0) return;
    __syncthreads();
    measure_row();
    measured_ = -1;
    __syncthreads();
  }

  /// A row besides the step's own. Gives a barrier.
  __device__ void attend_again(int token, int newest_key) {
    settle_measure();
    look(token, newest_key, false);
    p_.template attend_apart<width, tile>(token);
    row_of_ = newest_key < p_.now ? -1 : token;
    own_look_ = false;
  }
  /// on_attention of the step's row, for a thread's own slots. Not inlined: most steps observe while they score.
  __device__ void observe() const {
    if constexpr (detail::declares_on_attention<P>)
      observe_apart(p_.fixed, p_.policy, p_.size, p_.now, p_.phase, p_.block);
  }
  static __device__ __noinline__ void observe_apart(Fixed& fixed, const P& policy, int size, int now, Phase phase,
                                                    int block) {
    if (fixed.trace.group > stream_heads) {
      Player<P, tile> player(fixed, policy);
      player.size = size, player.now = now, player.phase = phase, player.block = block;
      return player.observe_row();
    }
    const SlotLoop<P> slots(fixed, now);
    const P mine = policy;
    const auto nothing_else = [](int, int) {};
    if (slots.info.group <= loop_heads)
      slots.observe(mine, size, nothing_else);
    else
      slots.template observe<stream_heads>(mine, size, nothing_else);
  }

  __device__ void start_clock() {
    if (args_.timed) start_clock_apart(p_.fixed);
  }
  __device__ void stop_clock(TimedPhase phase) {
    if (args_.timed) stop_clock_apart(p_.fixed, p_.block * timed_phases + static_cast<int>(phase));
  }
  static __device__ __noinline__ void start_clock_apart(Fixed& fixed) {
    if (threadIdx.x == 0) fixed.clock = clock64();
  }
  static __device__ __noinline__ void stop_clock_apart(Fixed& fixed, int index) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    const long long now = clock64();
    fixed.unit.clocks[index] += static_cast<unsigned>(now - fixed.clock);
    fixed.clock = now;
  }

  /// What a copy that went on in this one's place left behind.
  __device__ void follow(const StepRow& copy) {
    p_.follow(copy.p_), p_.probe_known = copy.p_.probe_known, bias_ = copy.bias_, weights_ = copy.weights_;
    row_of_ = copy.row_of_, measured_ = copy.measured_, measured_token_ = copy.measured_token_;
    own_look_ = copy.own_look_, look_probes_ = copy.look_probes_, bias_moved_ = copy.bias_moved_;
  }

  // Named barriers. One of each warp that streams: outputs were made of the parts that the last row left; and of those that serve.
  static constexpr int parts_are_free = 1, serving = parts_are_free + stream_warps;
  static constexpr int streaming_threads = 32 * stream_warps, serving_threads = team_threads - streaming_threads;

  const bool prepares_;              // every step does
  TokenAttention::Weights weights_;  // of the last row, where it is plain
  const float* bias_ = nullptr;
  int row_of_ = -1;                          // token whose row the logits are of
  int measured_ = -1, measured_token_ = -1;  // the measured query whose outputs still have to be compared, or -1
  bool own_look_ = false;                    // fixed.look is that of a step's own row
  bool look_probes_ = false;                 // and has the policy's key probe
  bool bias_moved_ = false;
};

}  // namespace kv
