// The row of a step: the warps that stream it and those that serve them, its measure, and the rows that attend besides it.
#pragma once
#include "kernels/late_fold.cuh"

namespace kv {

/// `width`, `tile`: of the streams, where rows are plain; 0 for any rows.
template <class P, int width, int tile>
class StepRow : protected LateFold<P, width, tile> {
  using Base = LateFold<P, width, tile>;

 public:
  using Base::biased;
  using Base::fetchers;
  using Base::folds_late;
  using Base::has_row_hooks;
  using Base::may_part;
  using Base::measurers;
  using Base::newest_reader;
  using Base::plain;
  using Base::row_writer;
  using Base::size;
  /// How far ahead of a step's end inputs are fetched: where the warps part they are for the step after next.
  static constexpr int fetched_ahead = may_part ? 2 : 1;

  __device__ StepRow(const Launch& launch, Fixed& fixed, const P& policy)
      : Base(launch, fixed, policy),
        prepares_((!may_part && p_.traits().key_probe) || biased ||
                  (!plain && (!p_.fixed.streamed || !p_.absolute() || p_.layer.window > 0 ||
                              p_.traits().future_queries.horizon > 0 || p_.traits().future_mass))) {}

 protected:
  using Base::absolute;
  using Base::args_;
  using Base::asks_for_mass;
  using Base::attention;
  using Base::begin_step;
  using Base::bias_;
  using Base::fetcher;
  using Base::future_mass;
  using Base::inputs;
  using Base::land_after_row;
  using Base::land_at_once;
  using Base::look;
  using Base::measurer;
  using Base::merges;
  using Base::p_;
  using Base::streamed;
  using Base::streams_now;

  __device__ int stream_tile() const { return plain ? tile : p_.fixed.tile; }

  __device__ void begin() {
    if (streamed()) {  // beyond the group and the dimension queries stay zeros
      const int words = p_.row.query_rows * query_pitch(Base::stream_width()) / 2;
      for (int i = static_cast<int>(threadIdx.x); i < words; i += team_threads)
        for (std::uint16_t* buffer : p_.row.queries) reinterpret_cast<unsigned*>(buffer)[i] = 0;
      if (p_.traits().key_probe) clear_probe();
    }
    if (p_.is_clerk())
      for (int token = args_.first; token <= args_.first + fetched_ahead; ++token) fetch_numbers(token);
    close_copies();
    await_copies<0>();
    __syncthreads();
    if (!streams_now())
      for (int token = args_.first; token < min(args_.first + fetched_ahead, args_.last); ++token) fetch(token);
    close_copies();
    await_copies<0>();
    __syncthreads();
  }
  /// So that what a row's end leaves of the operands of probes, and a key that counts nothing yet, are numbers.
  __device__ void clear_probe() const {
    const int w = Base::stream_width(), i = static_cast<int>(threadIdx.x);
    if (i < w) static_cast<std::uint16_t*>(p_.row.stream.probe.gone_key(w))[i] = 0;
    for (int k = i; k < input_buffers * w; k += team_threads) p_.row.key[k] = 0;
  }
  /// After the last step.
  __device__ void end() {
    if (p_.is_clerk_warp()) await_gap();
    await_copies<0>();
    __syncthreads();
    measure_row();
    if constexpr (folds_late) land_at_once(p_.now + 1);
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
    const bool stays = absolute() && !asks_for_mass() && !future_mass();
    if (streams_now()) {
      const int stale = detail::declares_on_merge<P> ? p_.stale : -1;  // only folds write rows of slots that stay
      if (stale >= 0 && stale < last && p_.streams_slot(stale, stream_tile())) {
        if constexpr (folds_late)  // seldom
          patch_apart(p_.fixed, p_.ring, stale, stream_tile());
        else
          patch_from_memory(p_, stale, stream_tile());
      }
      stream(now);
    } else {
      if constexpr (plain && !may_part) measure_row<false>();
      if (appends && p_.warp == row_writer) p_.write_rows_of(last, inputs().key(token), inputs().value(token));
      if (p_.is_clerk_warp()) {
        await_gap();
        if (appends) p_.append_one(token, inputs().key(token), inputs().value(token));
        if (plain && p_.traits().key_probe) settle_probe(token);
      }
      constexpr unsigned servers = team_warps - stream_warps;
      const unsigned turn = static_cast<unsigned>(newest_reader - p_.warp) % servers;
      attention().newest_slot(p_.fixed.look, now, p_.row, static_cast<int>(turn), servers);
      if constexpr (may_part) {
        if (p_.warp == row_writer && p_.traits().key_probe && p_.probe_known) {
          const float probe = probe_of_newest<__nv_bfloat16, width>(p_.row.stream.probe, now, p_.row.stream.gates);
          if (threadIdx.x % 32 == 0) p_.unit.probe[last] = probe;
        }
        await_copies<0>();  // the next step's inputs
      } else {
        if (p_.is_clerk_warp()) attention().newest_probe(p_.fixed.look, now);
        serve(token);
      }
    }
    __syncthreads();
    // What lies on the stack over a stream is read anew at every use, unless it is made anew.
    if constexpr (plain) begin_step(same_in_warp(p_.now)), row_of_ = p_.now, p_.size = same_in_warp(p_.size);
    p_.stale = p_.changed = -1, gap_open_ = false;
    TileRing::advance(p_.ring, TileRing::tiles_of_row(p_.size - 1, stream_tile()), stays, p_.warp);
    if (lags()) {
      KeyProbe& probe = p_.row.stream.probe;
      p_.probe_known = p_.probe_known && probe.holds;
      if (p_.is_clerk()) probe.weight[0] = probe.weight[1] = 0, probe.moved = false;
    }
    if constexpr (!plain)
      attention().combine(p_.fixed.look, now, p_.row);
    else if (sees_row())
      weights_ = attention().log_sums(args_.trace.group, p_.row, p_.now, measurer(), measurers);
    if constexpr (folds_late) land_after_row();
  }

  /// A slot's row of memory, where the ring of the warp that it belongs to holds it.
  static __device__ __forceinline__ void patch_from_memory(const Play& play, int slot, int of) {
    const auto row = [&](const void* rows, int dim) { return play.at(rows, slot, dim); };
    play.patch(slot, row(play.unit.keys, play.trace.key_dim), row(play.unit.values, play.trace.value_dim), of);
  }
  /// The same, not inlined and of few words.
  static __device__ __noinline__ void patch_apart(Fixed& fixed, Ring ring, int slot, int of) {
    Play play(fixed);
    play.ring = ring;
    patch_from_memory(play, slot, of);
  }

  /// Plain rows are streamed here, others by a call.
  __device__ __forceinline__ void stream(const RowNow& now) {
    const RowLook& look = p_.fixed.look;
    StreamMemory& memory = p_.row.stream;
    if constexpr (plain) {
      const auto run = [&](auto probing) __attribute__((always_inline)) {
        const StreamSource from{&args_.maps.keys, &args_.maps.values, p_.fixed.unit_index};
        const int kept_tiles = args_.settings.kept_tiles;
        Stream<__nv_bfloat16, width, tile, probing.value, true, biased> stream(look, now, memory, from, kept_tiles,
                                                                               args_.trace.group, p_.warp, true);
        stream.start(p_.ring);  // inlined: synccheck reports warps that come from a call to the row's barrier
        stream.run(p_.ring);
      };
      if (p_.traits().key_probe && p_.probe_known)
        run(std::integral_constant<Probing, Probing::among_queries>{});
      else
        run(std::integral_constant<Probing, Probing::none>{});
    } else {
      const Ring ring = p_.ring;
      const RowNow copy = now;
      stream_apart(p_.trace.elements, look, copy, memory, ring);
    }
  }

  /// Whether the policy's key probe goes along with the row that fixed.look is of.
  __device__ bool looks_for_probe() const { return p_.traits().key_probe && p_.fixed.look.probe != nullptr; }
  /// Whether rows are streamed with a policy's vector of the step before, and what hooks add to it since.
  __device__ bool lags() const { return may_part && p_.traits().key_probe; }
  /// Something else has changed the vector since: it has to be placed anew before the next row. A barrier must follow.
  __device__ void vector_moves() const {
    if (lags() && p_.is_clerk()) p_.row.stream.probe.moved = true;
  }
  __device__ bool vector_moved() const { return lags() && p_.row.stream.probe.moved; }
  /// The policy's vector as hooks have made it, for the row under way and the next one; by the clerk's warp.
  __device__ void settle_probe(int token) const {
    if (p_.probe_known) {
      p_.row.stream.gates.arrive(Gate::weights_known), p_.row.stream.gates.arrive(Gate::newest_weights_known);
    }
    if constexpr (may_part)
      kv::settle_probe<__nv_bfloat16, width>(p_.row.stream.probe, p_.unit.vector, args_.trace.key_dim, token,
                                             inputs().key(token));
  }
  /// Play::take_place where rows are plain and the newest one is that of a token; a lane reads its part of it once.
  __device__ __forceinline__ void take_place(int victim, int token) {
    if (victim != p_.size - 1 && p_.streams_slot(victim, tile)) {
      const int lane = static_cast<int>(threadIdx.x % 32), chunk = lane % 16;
      const bool keys = lane < 16;
      const int dim = keys ? args_.trace.key_dim : args_.trace.value_dim;
      const bool there = chunk * 8 < dim;
      const uint4* const newest = reinterpret_cast<const uint4*>(keys ? p_.row.key : p_.row.value) +
                                  token % input_buffers * (width / 8) + (there ? chunk : 0);
      uint4* const rows = reinterpret_cast<uint4*>(keys ? p_.unit.keys : p_.unit.values);
      const unsigned rings = shared_address(p_.row.stream.ring);
      __syncwarp();  // or the compiler puts these reads off
      const uint4 words = *newest;
      TileRing::patch(rings, p_.ring, width, tile, victim, words, there);
      if (there) rows[victim * (dim / 8) + chunk] = words;
      __syncwarp();
    }
    p_.changed = victim, --p_.size;
  }

  /// As BlockTeam::least, and the slot's key and value are kept for on_evict and the next row's probe: each warp has read those of
  /// its own best slot by the time that one is known.
  __device__ __forceinline__ int least_with_rows(unsigned long long key, int slot) const {
    uint4 words{};
    const int lane = static_cast<int>(threadIdx.x % 32), chunk = lane % 16;
    const bool keys = lane < 16;
    const int dim = keys ? args_.trace.key_dim : args_.trace.value_dim;
    const bool is_there = chunk * 8 < dim;
    const auto best = p_.team.least(key, slot, p_.now & 1, [&](int of_lane) {
      const int mine = __shfl_sync(~0u, slot, of_lane);
      const void* const rows = keys ? p_.unit.keys : p_.unit.values;
      if (mine >= 0 && is_there) words = static_cast<const uint4*>(rows)[mine * (dim / 8) + chunk];
    });
    if (best.slot < 0) return -1;
    const KeyProbe& probe = p_.row.stream.probe;
    if (p_.warp == best.warp && is_there)
      static_cast<uint4*>(keys ? probe.gone_key(width) : probe.gone_value(width))[chunk] = words;
    __syncthreads();
    return best.slot;
  }

  /// Whether the warps part at the end of a step that lets one slot go: but for clocks, which want all to be where they are.
  __device__ bool parts() const {
    const Traits traits = p_.traits();
    return (lags() || (!traits.key_probe && !detail::declares_on_evict<P>)) && !traits.window_past &&
           !traits.window_once && args_.trace.group <= loop_heads && !args_.timed &&
           !(merges() &&
             (!folds_late || traits.nearest != Nearest::none || traits.key_probe || traits.observation_window > 0));
  }
  /// The clerk's warp waits until others have closed the gap that a slot left.
  __device__ void await_gap() const {
    if (gap_open_) p_.row.stream.gates.pass(Gate::gap_closed);
  }
  /// on_evict of a slot whose rows have been kept, while others write over them; by one warp.
  __device__ void evict_hook(int victim) const {
    const KeyProbe& probe = p_.row.stream.probe;
    Player<P, plain>::template row_hook<false>(p_.fixed, p_.policy, p_.size, p_.now, p_.phase, p_.block, victim,
                                               probe.gone_key(width), probe.gone_value(width));
  }

  /// What the warps that do not stream do for steps to come, which must await the copies; and for the one before, unless rows
  /// are plain.
  __device__ void serve(int token) {
    if constexpr (!plain) measure_row();
    fetch_ahead(token);
    if (copies_boxes && p_.warp == row_writer) written_to_device();  // the newest row, which a stream may come to next
  }
  __device__ void fetch_ahead(int token) const {
    const int coming = token + fetched_ahead;
    if (coming >= args_.last) return;
    fetch(coming);
    if (threadIdx.x == team_threads - 32) fetch_numbers(coming + 1);
    close_copies();
  }
  /// A token's inputs; its numbers are there.
  __device__ void fetch(int token) const {
    const auto& numbers = p_.fixed.coming[token % 4];
    if (streamed() && fetcher() >= 0) inputs().fetch(token, numbers.measured, numbers.row, fetcher(), fetchers);
  }
  /// Fixed::coming of a token, by one thread.
  __device__ void fetch_numbers(int token) const {
    auto& numbers = p_.fixed.coming[token % 4];
    const int there = min(token, args_.trace.tokens - 1);
    copy_4(shared_address(&numbers.measured), args_.settings.measured_of_token + there, true);
    copy_4(shared_address(&numbers.row), p_.layer.row_of_token + there, true);
  }

  /// Whether hooks see what a row gives: else only who measures has to do with its log-sum-exps.
  __device__ bool sees_row() const { return detail::declares_on_attention<P> || p_.traits().observation_window > 0; }

  /// Compares the outputs of the last row that was measured, which is a step back or the present one: heads are dealt over the
  /// warps that do not stream. Of plain rows parts are left, which the next row leaves alone. `apart`: where that is seldom done.
  template <bool apart = true>
  __device__ __forceinline__ void measure_row() {
    if (measured_ < 0 || streams_now()) return;
    if (measurer() >= measurers) return;
    if constexpr (plain)
      if (!sees_row() && 2 * measurer() < args_.trace.group)
        weights_ = attention().log_sums(args_.trace.group, p_.row, measured_token_, measurer(), measurers);
#pragma unroll 1
    for (int turn = measurer(); turn < args_.trace.group; turn += measurers) {
      if constexpr (!plain) {
        measure_head(p_.fixed, turn, measured_, measured_token_, p_.row.output + turn * p_.trace.value_dim,
                     inputs().full_output(measured_token_, turn, measured_), static_cast<double>(p_.row.log_sum[turn]));
      } else if (2 * turn < args_.trace.group) {  // a pair of heads
        const int g = TokenAttention::head_of_pair(turn);
        const MeasuredHead head{g, measured_, args_.settings.measured_count, measured_token_};
        const auto output = attention().output_of(g, weights_, args_.trace.group, args_.trace.value_dim, width,
                                                  measured_token_, inputs().value(measured_token_), p_.row);
        const float* const full_output =
            inputs().full_output(measured_token_, min(g, args_.trace.group - 1), measured_);
        std::conditional_t<folds_late, LateShare, NoLateShare> lacks;
        if constexpr (folds_late) lacks = this->late_share(min(g, args_.trace.group - 1), measured_token_);
        if constexpr (apart)
          measure_half_apart(p_.fixed, args_.trace, head, output, lacks, full_output);
        else
          measure_half(p_.fixed, args_.trace, head, output, lacks, full_output);
      }
    }
  }
  /// What the warps that do not stream do after a step's row, where they may part from the others.
  __device__ __forceinline__ void look_back(int token) {
    measure_row<false>();
    measured_ = -1;
    serve(token);
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
  __device__ void start_clock() {
    if (args_.timed) start_phase_clock(p_.fixed);
  }
  __device__ void stop_clock(TimedPhase phase) {
    if (args_.timed) stop_phase_clock(p_.fixed, p_.block * timed_phases + static_cast<int>(phase));
  }

  /// What a copy that went on in this one's place left behind.
  __device__ void follow(const StepRow& copy) {
    p_.follow(copy.p_), p_.probe_known = copy.p_.probe_known, bias_ = copy.bias_, weights_ = copy.weights_;
    row_of_ = copy.row_of_, measured_ = copy.measured_, measured_token_ = copy.measured_token_;
    own_look_ = copy.own_look_, bias_moved_ = copy.bias_moved_, gap_open_ = copy.gap_open_;
  }

  const bool prepares_;                      // every step does
  TokenAttention::Weights weights_;          // of the last row, where it is plain
  int row_of_ = -1;                          // token whose row the logits are of
  int measured_ = -1, measured_token_ = -1;  // the measured query whose outputs still have to be compared, or -1
  bool own_look_ = false;                    // fixed.look is that of a step's own row
  bool bias_moved_ = false;
  bool gap_open_ = false;  // others close the gap of a slot that went, which the clerk has to await
};

}  // namespace kv
