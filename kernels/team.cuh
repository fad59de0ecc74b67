// Who works on a head in kernels: a thread block. Same results, to the bit, as HostTeam of policies/teams.hpp.
#pragma once
#include <cmath>

#include "kernels/elements.cuh"
#include "kernels/warp_rows.cuh"

namespace kv {

/// Shared memory of a team: one per thread block.
struct TeamMemory {
  alignas(16) float partial[team_threads];
  int warp_sums[team_warps + 1];
  unsigned long long best[team_warps];
  struct alignas(16) Least {
    unsigned long long key;
    int slot, warp;  // and who has it
  } least[2][team_warps];
  alignas(16) int counts[256];
  int flag, number;
};

static_assert(sizeof(TeamMemory) + 1024 <= team_memory_bytes);

/// A number as one that the compiler knows to be the same in all lanes of a warp: branches on it are no divergence, and what
/// follows from it needs no lanes. Full warps only.
template <class T>
__device__ T same_in_warp(T x) {
  return __shfl_sync(~0u, x, 0);
}
/// The thread's warp, as such a number.
__device__ inline int warp_of_team() { return same_in_warp(static_cast<int>(threadIdx.x / 32)); }

/// A thread block of `team_threads` as a team. An index always meets the same thread, so passes over one's own slots need
/// no sync(). All members must call together, but for for_each.
struct BlockTeam {
  TeamMemory* memory;

  template <class F>
  __device__ void for_each(int n, F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += team_threads) f(i);
  }
  __device__ void sync() const { __syncthreads(); }

  /// f(i, read(i)) for every i < n. `ahead` are read before the first is used: stores of one do not hold up loads of the next,
  /// nor does what `read` makes of them, as long as it has no branches. What is left to read beyond the last is the last.
  template <int ahead = 4, class Read, class F>
  __device__ void for_each_read(int n, Read read, F f) const {
    for_each_read_by<ahead>(static_cast<int>(threadIdx.x), team_threads, n, read, f);
  }
  /// The same by some of the threads, of which this is the `thread`-th of so many.
  template <int ahead = 4, class Read, class F>
  __device__ static void for_each_read_by(int thread, int threads, int n, Read read, F f) {
    for (int first = thread; first < n; first += ahead * threads) {
      decltype(read(0)) mine[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) mine[k] = read(min(first + k * threads, n - 1));
#pragma unroll
      for (int k = 0; k < ahead; ++k)
        if (first + k * threads < n) f(first + k * threads, mine[k]);
    }
  }
  /// The same after add(what was read, term(i, t)) for every t < terms, `ahead` indices at a time.
  template <int ahead = 8, class Read, class Term, class Add, class F>
  __device__ void for_each_read(int n, Read read, int terms, Term term, Add add, F f) const {
    for (int begin = 0; begin < n; begin += ahead * team_threads) {
      const auto index = [&](int k) { return begin + k * team_threads + static_cast<int>(threadIdx.x); };
      decltype(read(0)) mine[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) mine[k] = read(min(index(k), n - 1));
#pragma unroll 1
      for (int t = 0; t < terms; ++t) {
        decltype(term(0, 0)) theirs[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k) theirs[k] = term(min(index(k), n - 1), t);
        __syncwarp();  // or the compiler puts every load off to its use
#pragma unroll
        for (int k = 0; k < ahead; ++k) add(mine[k], theirs[k]);
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k)
        if (index(k) < n) f(index(k), mine[k]);
    }
  }

  /// As HostTeam::sum, in the same order of additions.
  template <class F>
  __device__ float sum(int n, F f) const {
    float mine = 0;
    for_each_read(n, f, [&](int, float x) { mine += x; });
    float* partial = memory->partial;
    __syncthreads();
    partial[threadIdx.x] = mine;
    for (unsigned half = team_threads / 2; half >= 32; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x < 32) {
      float x = partial[threadIdx.x];
      for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(~0u, x, half);
      if (threadIdx.x == 0) partial[0] = x;
    }
    __syncthreads();
    return partial[0];
  }

  /// As HostTeam::add_rows, in the same order of additions. Gives a barrier.
  template <class Head, class RowOf, class Weight>
  __device__ void add_rows(const Head& head, RowOf row, Weight weight, float* sum, int dim) const {
    if constexpr (requires { row(0).in_eights(); })
      if (row(0).in_eights()) {
        const auto eights = [&](int slot) { return row(slot).eights(); };
        return add_eights(head, eights, weight, sum, dim);
      }
    add_eights(head, row, weight, sum, dim);
  }

  /// As HostTeam::distances, in the same order of additions. Needs a barrier before; one must follow.
  template <class Head, class RowOf, class Weight, class F>
  __device__ void distances(const Head& head, RowOf row, Weight weight, const float* vector, bool absolute, F f) const {
    const int size = head.size(), dim = row(0).dim;
    const auto term = [&](float x, float w, float v) {
      const float difference = w * x - v;
      return absolute ? std::abs(difference) : difference * difference;
    };
    const auto tell = [&](int slot, float sum) { f(slot, absolute ? sum : std::sqrt(sum)); };
    if constexpr (requires { row(0).in_eights(); })
      if (row(0).in_eights() && dim <= 128) {
        const auto eights = [&](int slot) { return row(slot).eights(); };
        return distances_of_eights(size, dim, eights, weight, vector, term, tell);
      }
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int slot = static_cast<int>(threadIdx.x / 32); slot < size; slot += team_warps) {
      const auto mine = row(slot);
      const float w = weight(slot);
      float sum[1] = {};
      for (int first = 8 * lane; first < dim; first += 8 * 32)
        for (int c = first; c < min(first + 8, dim); ++c) sum[0] += term(mine[c], w, vector[c]);
      sum_over_lanes(sum, dim, 32);
      if (lane == 0) tell(slot, sum[0]);
    }
  }

  /// As HostTeam::max.
  template <class F>
  __device__ float max(int n, F f) const {
    float mine = -INFINITY;
    for_each(n, [&](int i) { mine = f(i) > mine ? f(i) : mine; });
    for (int half = 16; half > 0; half /= 2) {
      const float other = __shfl_down_sync(~0u, mine, half);
      mine = other > mine ? other : mine;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) memory->partial[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 0; w < team_warps; ++w) mine = memory->partial[w] > mine || w == 0 ? memory->partial[w] : mine;
    return mine;
  }

  /// The smallest of every member's key.
  __device__ unsigned long long min_key(unsigned long long key) const {
    const unsigned long long of_warp = least_of_warp(key);
    if (threadIdx.x % 32 == 0) memory->best[threadIdx.x / 32] = of_warp;
    __syncthreads();
    unsigned long long best = memory->best[0];
    for (int w = 1; w < team_warps; ++w) best = memory->best[w] < best ? memory->best[w] : best;
    __syncthreads();  // `best` may be written again
    return best;
  }

  /// The smallest of every member's key with its slot, which is -1 when there is none; keys differ. One barrier is enough, and
  /// given, if another lies between this and the next call of the same `turn` (0 or 1). `meanwhile` is called before it with the lane
  /// that has the least of its warp.
  __device__ TeamMemory::Least least(unsigned long long key, int slot, int turn) const {
    return least(key, slot, turn, [](int) {});
  }
  template <class Meanwhile>
  __device__ TeamMemory::Least least(unsigned long long key, int slot, int turn, Meanwhile meanwhile) const {
    TeamMemory::Least(&of_warps)[team_warps] = memory->least[turn];
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int best = first_with_least(key);
    if (lane == best) of_warps[threadIdx.x / 32] = {key, slot, 0};
    meanwhile(best);
    __syncthreads();
    const TeamMemory::Least theirs = lane < team_warps ? of_warps[lane] : TeamMemory::Least{~0ull, -1, 0};
    const int first = first_with_least(theirs.key);
    return {__shfl_sync(~0u, theirs.key, first), __shfl_sync(~0u, theirs.slot, first), first};
  }

  /// The first lane of a warp that has the smallest of its keys.
  __device__ static int first_with_least(unsigned long long key) {
    const auto high = static_cast<unsigned>(key >> 32), low = static_cast<unsigned>(key);
    const bool may_be = high == __reduce_min_sync(~0u, high);
    // Seldom more than one may be. But what is written under a predicate lives on from step to step, and would be spilt.
    const unsigned least_low = __reduce_min_sync(~0u, may_be ? low : ~0u);
    return __ffs(static_cast<int>(__ballot_sync(~0u, may_be && low == least_low))) - 1;
  }

  /// The smallest of a warp's keys.
  __device__ static unsigned long long least_of_warp(unsigned long long key) {
    const auto high = static_cast<unsigned>(key >> 32), low = static_cast<unsigned>(key);
    const unsigned least_high = __reduce_min_sync(~0u, high);
    const unsigned least_low = __reduce_min_sync(~0u, high == least_high ? low : ~0u);
    return static_cast<unsigned long long>(least_high) << 32 | least_low;
  }

  /// How many members' x add up to, and in `before` those of lower threads.
  __device__ int scan(int x, int& before) const {
    int sum = x;
    for (int k = 1; k < 32; k *= 2) {
      const int other = __shfl_up_sync(~0u, sum, k);
      if (threadIdx.x % 32 >= static_cast<unsigned>(k)) sum += other;
    }
    const int total = scan_warps(__shfl_sync(~0u, sum, 31), before);
    before += sum - x;
    return total;
  }

  /// f(i, has(i), how many j < i have the property) for every i < n; returns how many have it in all. What `has` returns is a
  /// bool, or what else is read of i and converts to one. In each round a warp asks for `each` times 32 neighbours before f is
  /// called for the first: without branches between their loads, beyond the last for that one. What f(i) writes no other
  /// has(j) may read.
  template <int each = 8, class Has, class F>
  __device__ int number(int n, Has has, F f) const {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    int so_far = 0;
    for (int first = 0; first < n; first += each * team_threads) {
      const int mine = first + each * 32 * warp + lane;
      decltype(has(0)) found[each];
#pragma unroll
      for (int k = 0; k < each; ++k) found[k] = has(min(mine + 32 * k, n - 1));
      unsigned have[each];
      int of_warp = 0, before;
#pragma unroll
      for (int k = 0; k < each; ++k) {
        have[k] = __ballot_sync(~0u, mine + 32 * k < n && static_cast<bool>(found[k]));
        of_warp += __popc(have[k]);
      }
      const int total = scan_warps(of_warp, before);
      before += so_far;
#pragma unroll
      for (int k = 0; k < each; ++k) {
        if (mine + 32 * k < n) f(mine + 32 * k, found[k], before + __popc(have[k] & ((1u << lane) - 1)));
        before += __popc(have[k]);
      }
      so_far += total;
    }
    return so_far;
  }

  /// How many i < n have the property.
  template <class Has>
  __device__ int count(int n, Has has) const {
    int mine = 0, before;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < n; i += team_threads) mine += has(i) ? 1 : 0;
    return scan(mine, before);
  }

  /// f(i, value(i), sum of value(j) over j < i) for every i < n, in rounds of four neighbours a thread; returns the sum of all.
  /// What f(i) writes no other value(j) may read.
  template <class Value, class F>
  __device__ int add_before(int n, Value value, F f) const {
    constexpr int each = 4;
    int so_far = 0;
    for (int first = 0; first < n; first += each * team_threads) {
      const int mine = first + each * static_cast<int>(threadIdx.x);
      int values[each], sum = 0, before = 0;
#pragma unroll
      for (int k = 0; k < each; ++k) values[k] = mine + k < n ? value(mine + k) : 0, sum += values[k];
      const int total = scan(sum, before);
      before += so_far;
#pragma unroll
      for (int k = 0; k < each; ++k) {
        if (mine + k < n) f(mine + k, values[k], before);
        before += values[k];
      }
      so_far += total;
    }
    return so_far;
  }

 private:
  /// add_rows of 128 channels at a time: 16 threads a part, 8 channels a thread.
  template <class Head, class EightsOf, class Weight>
  __device__ void add_eights(const Head& head, EightsOf row, Weight weight, float* sum, int dim) const {
    constexpr int parts = 16, lanes = team_threads / parts, ahead = 8;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x) % lanes;
    const bool upper = threadIdx.x % 32 >= lanes;
    for (int first = 0; first < dim; first += 8 * lanes) {
      const int channel = first + 8 * lane, size = head.size();
      float mine[8] = {};
      for (int begin = warp; begin < size; begin += ahead * parts) {
        struct Weighted {
          float weight, x[8];
        } rows[ahead];
        const auto place = [&](int k) { return begin + (upper ? parts / 2 : 0) + k * parts; };
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
          const int slot = head.at(min(place(k), size - 1));
          rows[k].weight = weight(slot);
          row(slot).eight(channel < dim ? channel : 0, rows[k].x);
        }
        __syncwarp();  // or the compiler puts every load off to its use
#pragma unroll
        for (int k = 0; k < ahead; ++k)
          if (place(k) < size)
#pragma unroll
            for (int c = 0; c < 8; ++c) mine[c] += rows[k].weight * rows[k].x[c];
      }
#pragma unroll
      for (float& x : mine) x += __shfl_xor_sync(~0u, x, lanes);
      float* partial = memory->partial;  // [warp][32]: of each half of a warp one channel at a time
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        __syncthreads();
        partial[threadIdx.x] = upper ? mine[k + 4] : mine[k];
        __syncthreads();
        const int c = channel + k + (upper ? 4 : 0);
        const auto pair = [&](int w) { return partial[32 * w + threadIdx.x] + partial[32 * (w + 4) + threadIdx.x]; };
        if (warp == 0 && c < dim) sum[c] = (pair(0) + pair(2)) + (pair(1) + pair(3));
      }
    }
    __syncthreads();
  }

  /// distances() of up to 128 channels: 16 threads a row, 8 channels a thread. The next rows are on their way while some are
  /// looked at.
  template <class EightsOf, class Weight, class Term, class Tell>
  __device__ void distances_of_eights(int size, int dim, EightsOf row, Weight weight, const float* vector, Term term,
                                      Tell tell) const {
    constexpr int lanes = 16, rows_beside = team_threads / lanes, ahead = 4;
    const int lane = static_cast<int>(threadIdx.x) % lanes, channel = 8 * lane, first = threadIdx.x % 32 >= lanes;
    float center[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) center[c] = channel < dim ? vector[channel + c] : 0.f;
    struct Weighted {
      float weight;
      EightWords words;
    } next[ahead];
    const auto slot_of = [&](int begin, int k) { return begin + first + k * rows_beside; };
    const auto read = [&](int begin) {
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        const int slot = min(slot_of(begin, k), size - 1);
        next[k] = {weight(slot), row(slot).words(channel < dim ? channel : 0)};
      }
    };
    int begin = 2 * static_cast<int>(threadIdx.x / 32);
    read(begin);
    for (; begin < size; begin += ahead * rows_beside) {
      Weighted rows[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) rows[k] = next[k];
      read(begin + ahead * rows_beside);
      __syncwarp();                     // or the compiler puts every load off to its use
      float sum[ahead] = {}, mine = 0;  // mine: of the row that this lane tells of
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        float x[8];
        rows[k].words.eight(0, x);
        if (channel < dim)
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[k] += term(x[c], rows[k].weight, center[c]);
      }
      sum_over_lanes(sum, dim, lanes);
#pragma unroll
      for (int k = 0; k < ahead; ++k) mine = lane == k ? sum[k] : mine;
      if (lane < ahead && slot_of(begin, lane) < size) tell(slot_of(begin, lane), mine);
    }
  }

  /// How many the warps' x add up to, and in `before` those of lower warps.
  __device__ int scan_warps(int x, int& before) const {
    if (threadIdx.x % 32 == 0) memory->warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    int total = 0;
    before = 0;
    for (unsigned w = 0; w < team_warps; ++w) {
      before += w < threadIdx.x / 32 ? memory->warp_sums[w] : 0;
      total += memory->warp_sums[w];
    }
    __syncthreads();
    return total;
  }
};

}  // namespace kv
