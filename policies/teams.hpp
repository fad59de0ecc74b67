// Who works on a row and on a head: a loop on the CPU; a warp and a thread block on CUDA, with the same order of additions
// (kernels/warp_rows.cuh, team.cuh).
#pragma once
#include <cmath>

#include "policies/views.hpp"

namespace kv {

/// Sums over channels: 8 channels in order, as many sums as there are chunks of a row, then a tree over these.
inline constexpr int max_chunks = 32;
KV_HD inline float sum_of_chunks(float (&chunk)[max_chunks], int dim) {
  const int chunks = (dim + 7) / 8;
  for (int n = chunks < max_chunks ? chunks : max_chunks; n > 1; n = (n + 1) / 2)
    for (int i = 0; i < n / 2; ++i) chunk[i] += chunk[i + (n + 1) / 2];
  return chunk[0];
}

/// Who works on a row: a loop on the CPU, a warp on CUDA. All members must call together.
struct RowTeam {
  /// Sum of a[c] * b[c], added up as by sum_of_chunks; the same order on both engines.
  template <class A, class B = Row>
  KV_HD float dot(A a, B b) const {
    float chunk[max_chunks] = {};
    const int chunks = (a.dim + 7) / 8;
    if (a.dim % 8 == 0 &&
        chunks <= max_chunks)  // channel by channel of all chunks at once: a vector loop, the same sums
      for (int c = 0; c < 8; ++c)
        for (int i = 0; i < chunks; ++i) chunk[i] += a[8 * i + c] * b[8 * i + c];
    else
      for (int c = 0; c < a.dim; ++c) chunk[(c / 8) % max_chunks] += a[c] * b[c];
    return sum_of_chunks(chunk, a.dim);
  }
  /// Of the angle between two rows; 0 when one is zero.
  template <class A, class B = Row>
  KV_HD float cosine(A a, B b) const {
    const float norms = std::sqrt(dot(a, a)) * std::sqrt(dot(b, b));
    const float cosine = norms > 0 ? dot(a, b) / norms : 0.f;
    return cosine > 1 ? 1.f : cosine < -1 ? -1.f : cosine;  // rounding may go beyond
  }
  template <class A, class B = Row>
  KV_HD float distance(A a, B b) const {
    float sum = 0;
    for (int c = 0; c < a.dim; ++c) sum += (a[c] - b[c]) * (a[c] - b[c]);
    return std::sqrt(sum);
  }
  /// vector += weight * row
  template <class A>
  KV_HD void add(float* vector, float weight, A row) const {
    for (int c = 0; c < row.dim; ++c) vector[c] += weight * row[c];
  }
};

/// Who works on a head: a loop on the CPU, a thread block on CUDA. An index always meets the same member, so passes
/// over one's own slots need no sync(); reading another's does.
struct HostTeam {
  template <class F>
  KV_HD void for_each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  /// f(i, read(i)), or f(i, what was read and then add(what was read, term(i, t)) for every t < terms): CUDA reads ahead, so
  /// `read` and `term` write nothing, have no branches around what they read, and read nothing that f writes of others.
  template <class Read, class F>
  KV_HD void for_each_read(int n, Read read, F f) const {
    for (int i = 0; i < n; ++i) f(i, read(i));
  }
  template <class Read, class Term, class Add, class F>
  KV_HD void for_each_read(int n, Read read, int terms, Term term, Add add, F f) const {
    for (int i = 0; i < n; ++i) {
      auto mine = read(i);
      for (int t = 0; t < terms; ++t) add(mine, term(i, t));
      f(i, mine);
    }
  }
  /// Sum of f(i): 256 strided partial sums, then a tree; the same order on both engines. Sums over slots go by place
  /// (head.at(i)), since engines may keep slots in different places of memory.
  template <class F>
  KV_HD float sum(int n, F f) const {
    float partial[256] = {};
    for (int i = 0; i < n; ++i) partial[i % 256] += f(i);
    for (int half = 128; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
    return partial[0];
  }
  /// sum[c] = sum of weight(slot) * row(slot)[c] over all slots of a head, for c < dim: 16 strided partial sums over places, then a
  /// tree; the same order on both engines.
  template <class Head, class RowOf, class Weight>
  KV_HD void add_rows(const Head& head, RowOf row, Weight weight, float* sum, int dim) const {
    constexpr int parts = 16;
    for (int first = 0; first < dim; first += 8) {
      float partial[parts][8] = {}, x[8];
      for (int place = 0; place < head.size(); ++place) {
        const int slot = head.at(place);
        const float w = weight(slot);
        row(slot).eight(first, x);
        for (int k = 0; k < 8; ++k) partial[place % parts][k] += w * x[k];
      }
      for (int half = parts / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
          for (int k = 0; k < 8; ++k) partial[i][k] += partial[i + half][k];
      for (int k = 0; k < 8; ++k)
        if (first + k < dim) sum[first + k] = partial[0][k];
    }
  }
  /// f(slot, how far weight(slot) * row(slot) is from a vector) for all slots of a head: the sum of absolute differences, or the
  /// root of that of squares; added up as by sum_of_chunks, the same order on both engines. CUDA calls f by other members than
  /// for_each does.
  template <class Head, class RowOf, class Weight, class F>
  KV_HD void distances(const Head& head, RowOf row, Weight weight, const float* vector, bool absolute, F f) const {
    for (int slot = 0; slot < head.size(); ++slot) {
      const auto mine = row(slot);
      const float w = weight(slot);
      float chunk[max_chunks] = {}, x[8];
      for (int first = 0; first < mine.dim; first += 8) {
        mine.eight(first, x);
        float& sum = chunk[first / 8 % max_chunks];
        for (int k = 0; k < 8 && first + k < mine.dim; ++k) {
          const float difference = w * x[k] - vector[first + k];
          sum += absolute ? std::abs(difference) : difference * difference;
        }
      }
      const float sum = sum_of_chunks(chunk, mine.dim);
      f(slot, absolute ? sum : std::sqrt(sum));
    }
  }
  /// The largest f(i); -infinity when n is 0.
  template <class F>
  KV_HD float max(int n, F f) const {
    float best = -INFINITY;
    for (int i = 0; i < n; ++i) best = f(i) > best ? f(i) : best;
    return best;
  }
  KV_HD void sync() const {}
};

}  // namespace kv
