// All that a policy file includes. A policy is a struct with a doc, parameters, state and hooks; KV_REGISTER makes it a
// name in YAML, on the command line, in the property tests and in figures. Nothing else is edited.
//
//   static constexpr PolicyDoc doc{...}        what it is
//   static constexpr Published published{...}  settings of the paper that differ from the defaults
//   void describe(auto& field)                 parameters: field("recent", recent, kv::Range{0, 1}, "help")
//   Traits traits() const                      what it asks of the engine, when that differs from the defaults
//   struct Slot, struct HeadState              its own state per slot and per KV head: plain data with defaults
//   struct Scratch                             per slot, for the length of one compression
//   static constexpr const char* fold_note     what Fold::note is, for quantiles in the row
//
// Hooks are found by name, whatever their signature; one that the engine cannot call does not compile.
//   slot hooks: one slot, its own data only
//     void  on_attention(auto slot, auto seen) const                    the attention of a block's queries
//     float score(auto slot) const                                      higher = keep; slot.seen() with a window
//     float log_bias(auto slot) const                                   added to its logits, e.g. log multiplicity
//     bool  receives(auto slot) const                                   trait nearest: may it receive victims?
//   head hooks: any slot, neighbours, head.seen(slot)
//     float score_in(auto& head, int slot) const                        higher = keep
//     void  on_compress(auto team, auto& head) const                    writes head.score(slot) for every slot
//     void  on_probe(auto team, auto& head) const                       trait probe: an incoming block's attention
//     void  on_selected(auto team, auto& head) const                    who stays is known: head.kept, head.target
//   row hooks: whole keys and values
//     void  on_append(auto row, auto& head, int slot) const             a token became a slot
//     void  on_evict(auto row, auto& head, int slot) const              a slot is about to go
//   merging
//     Fold  on_merge(auto& head, int victim) const                      a pure plan; Fold{} drops the victim
//     ValueFold on_merge(...)                                           the same where keys stay: nobody waits for it
//     void  on_target(auto& head, int target, FoldTarget& sum) const    all that joins one slot: other divisors
//     float key_weight(auto& head, int slot, int channel) const         in place of Fold::key and own_key
//     void  on_fold(Slot& into, const Slot& from, const Fold& plan) const   state joins after the rows were folded
//   what `seen` sums, by default the probability
//     static float weigh(float probability, float logit, int rows_after)
//     static float weigh_window(...)                                    the same for an observation window's rows
//
// With the trait `select = links` a score is that of the link from a slot to its right neighbour: lower = join first,
// kv::sink = never, kv::protect = when nothing else is left; on_merge is asked for the right slot of every picked link.
// Exactly one of score, score_in and on_compress. Every hook starts with KV_HD, the mark that lets it run in kernels.
// A hook writes to Slot and HeadState only; chance comes from kv::uniform(seed, layer, head, token) only.
#pragma once
#include <cmath>
#include <concepts>
#include <type_traits>
#include <utility>

#include "core/policy.hpp"
#include "core/random.hpp"
#include "policies/teams.hpp"

namespace kv {

struct Empty {};

/// The base of every policy: no state, no parameters, default traits.
struct Policy {
  using Slot = Empty;
  using HeadState = Empty;
  using Scratch = Empty;
  static constexpr Published published{};
  KV_HD Traits traits() const { return {}; }
};

namespace detail {

// True when P declares the name, whatever its type: taking the address in a struct that inherits it twice is ambiguous.
#define KV_DECLARES(hook)                             \
  struct Hook_##hook {                                \
    void hook();                                      \
  };                                                  \
  template <class P>                                  \
  struct Both_##hook : P, Hook_##hook {};             \
  template <class P>                                  \
  inline constexpr bool declares_##hook = !requires { \
    &Both_##hook<P>::hook;                            \
  };
KV_DECLARES(on_attention)
KV_DECLARES(score)
KV_DECLARES(score_in)
KV_DECLARES(on_compress)
KV_DECLARES(on_append)
KV_DECLARES(on_evict)
KV_DECLARES(on_merge)
KV_DECLARES(on_fold)
KV_DECLARES(weigh)
KV_DECLARES(weigh_window)
KV_DECLARES(log_bias)
KV_DECLARES(receives)
KV_DECLARES(on_probe)
KV_DECLARES(on_selected)
KV_DECLARES(on_target)
KV_DECLARES(key_weight)
KV_DECLARES(describe)
#undef KV_DECLARES

/// Whether P's plans say by their type that keys stay.
template <class P, class Head>
constexpr bool folds_values = requires(const P& p, Head& head) {
  { p.on_merge(head, 0) } -> std::same_as<ValueFold>;
};

/// One line for each thing that can be wrong with a policy. Returns true so that registration can depend on it.
template <class P>
constexpr bool check_policy() {
  using Slot = typename P::Slot;
  using Head = HeadView<Slot, typename P::HeadState, typename P::Scratch>;
  using Ref = SlotView<Slot>;
  static_assert(std::is_base_of_v<Policy, P>, "a policy derives from kv::Policy");
  static_assert(
      requires { P::doc.name; }, "a policy has a `static constexpr kv::PolicyDoc doc`");
  static_assert(std::is_trivially_copyable_v<P>,
                "a policy's parameters must be plain data: they travel to kernels by value");
  static_assert(std::is_trivially_copyable_v<Slot> && std::is_trivially_copyable_v<typename P::HeadState> &&
                    std::is_trivially_copyable_v<typename P::Scratch>,
                "Slot, HeadState and Scratch must be plain data");
  static_assert(int(declares_score<P>) + int(declares_score_in<P>) + int(declares_on_compress<P>) == 1,
                "a policy defines exactly one of score(slot), score_in(head, slot) and on_compress(team, head)");
  static_assert(std::is_empty_v<Slot> || declares_on_attention<P> || declares_on_append<P> || declares_on_compress<P> ||
                    declares_on_probe<P>,
                "Slot has members that no hook can have written: is a hook's name misspelt?");
  static_assert(!declares_on_attention<P> || !std::is_empty_v<Slot>, "on_attention needs a Slot to write to");
  static_assert(declares_on_merge<P> || !(declares_on_fold<P> || declares_on_target<P> || declares_key_weight<P>),
                "on_fold, on_target and key_weight are never called without on_merge");
  static_assert(std::same_as<std::remove_cv_t<decltype(P::published)>, Published>,
                "published must be: static constexpr kv::Published published{...}");
  static_assert(
      requires(const P& p) {
        { p.traits() } -> std::same_as<Traits>;
      },
      "traits must be: kv::Traits traits() const");
  if constexpr (declares_describe<P>)
    static_assert(
        requires(P & p, FieldLister & field) { p.describe(field); }, "describe must be: void describe(auto& field)");
  if constexpr (declares_score<P>)
    static_assert(
        requires(const P& p) {
          { p.score(std::declval<Ref>()) } -> std::same_as<float>;
        },
        "score must be: float score(auto slot) const");
  if constexpr (declares_score_in<P>)
    static_assert(
        requires(const P& p, Head& head) {
          { p.score_in(head, 0) } -> std::same_as<float>;
        },
        "score_in must be: float score_in(auto& head, int slot) const");
  if constexpr (declares_on_compress<P>)
    static_assert(
        requires(const P& p, Head& head) {
          { p.on_compress(HostTeam{}, head) } -> std::same_as<void>;
        },
        "on_compress must be: void on_compress(auto team, auto& head) const");
  if constexpr (declares_on_attention<P>)
    static_assert(
        requires(const P& p) {
          { p.on_attention(std::declval<Ref>(), std::declval<Observed>()) } -> std::same_as<void>;
        },
        "on_attention must be: void on_attention(auto slot, auto seen) const");
  if constexpr (declares_on_append<P>)
    static_assert(
        requires(const P& p, RowTeam row, Head& head) {
          { p.on_append(row, head, 0) } -> std::same_as<void>;
        },
        "on_append must be: void on_append(auto row, auto& head, int slot) const");
  if constexpr (declares_on_evict<P>)
    static_assert(
        requires(const P& p, RowTeam row, Head& head) {
          { p.on_evict(row, head, 0) } -> std::same_as<void>;
        },
        "on_evict must be: void on_evict(auto row, auto& head, int slot) const");
  if constexpr (declares_on_merge<P>)
    static_assert(
        folds_values<P, Head> ||
            requires(const P& p, Head& head) {
              { p.on_merge(head, 0) } -> std::same_as<Fold>;
            },
        "on_merge must be: kv::Fold on_merge(auto& head, int victim) const");
  if constexpr (declares_on_fold<P>)
    static_assert(
        requires(const P& p, Slot& into, const Slot& from, const Fold& plan) {
          { p.on_fold(into, from, plan) } -> std::same_as<void>;
        },
        "on_fold must be: void on_fold(Slot& into, const Slot& from, const Fold& plan) const");
  if constexpr (declares_weigh<P>)
    static_assert(
        requires {
          { P::weigh(0.f, 0.f, 0) } -> std::same_as<float>;
        },
        "weigh must be: static float weigh(float probability, float logit, int rows_after)");
  if constexpr (declares_weigh_window<P>)
    static_assert(
        requires {
          { P::weigh_window(0.f, 0.f, 0) } -> std::same_as<float>;
        },
        "weigh_window must be: static float weigh_window(float probability, float logit, int rows_after)");
  if constexpr (declares_log_bias<P>)
    static_assert(
        requires(const P& p) {
          { p.log_bias(std::declval<Ref>()) } -> std::same_as<float>;
        },
        "log_bias must be: float log_bias(auto slot) const");
  if constexpr (declares_receives<P>)
    static_assert(
        requires(const P& p) {
          { p.receives(std::declval<Ref>()) } -> std::same_as<bool>;
        },
        "receives must be: bool receives(auto slot) const");
  if constexpr (declares_on_probe<P>)
    static_assert(
        requires(const P& p, Head& head) {
          { p.on_probe(HostTeam{}, head) } -> std::same_as<void>;
        },
        "on_probe must be: void on_probe(auto team, auto& head) const");
  if constexpr (declares_on_selected<P>)
    static_assert(
        requires(const P& p, Head& head) {
          { p.on_selected(HostTeam{}, head) } -> std::same_as<void>;
        },
        "on_selected must be: void on_selected(auto team, auto& head) const");
  if constexpr (declares_on_target<P>)
    static_assert(
        requires(const P& p, Head& head, FoldTarget& sum) {
          { p.on_target(head, 0, sum) } -> std::same_as<void>;
        },
        "on_target must be: void on_target(auto& head, int target, kv::FoldTarget& sum) const");
  if constexpr (declares_key_weight<P>)
    static_assert(
        requires(const P& p, Head& head) {
          { p.key_weight(head, 0, 0) } -> std::same_as<float>;
        },
        "key_weight must be: float key_weight(auto& head, int slot, int channel) const");
  return true;
}

}  // namespace detail
}  // namespace kv

// The engine that compiles a policy file says what registering means: the CPU engine adds it to the catalogue; kernels/
// defines KV_REGISTER itself before including the file and instantiates device code.
#if !defined(KV_REGISTER)
#include "policies/adapter.hpp"
#define KV_REGISTER(Type)                            \
  static_assert(::kv::detail::check_policy<Type>()); \
  [[maybe_unused]] const bool registered_##Type = ::kv::register_policy(::kv::entry_of<Type>(__FILE__))
#endif
