// The forward pass: projections and mix of all steps at once, then the recurrence.
//
// A step of the recurrence has two matrix products, W_r and W_z, then W_h, and a pass over rows
// after each. A team shares columns of W and rows, and meets four times a step. Where there are
// many samples or groups, each thread takes samples of its own instead and meets nobody. Bound: FMA
// throughput from 8 rows on, the bandwidth of the weights (3 H^2 values per step) below.
#pragma once

#include <numeric>
#include <utility>
#include <vector>

#include "buffers.h"
#include "dot.h"
#include "gemm.h"
#include "schedule.h"

namespace mmixer::cpu::MMIXER_ISA {

// The multiplications of a step's product, by which a call has its team.
inline int64_t multiplications(const Problem& p) {
  return p.groups * p.batch * p.hidden * p.hidden;
}

inline int worthy_threads(const Problem& p) {
  return cpu::worthy_threads(multiplications(p), p.threads);
}

inline int team_size(const Problem& p) { return cpu::team_size(multiplications(p), p.threads); }

// The groups of a call that are computed at once: those of one thread one after another, in the
// memory of the largest, which stays in the caches.
inline int64_t groups_at_once(const Problem& p) { return worthy_threads(p) == 1 ? 1 : p.groups; }

// The groups from this one on that are computed at once with it.
template <class T>
Problem from_group(Problem p, int64_t group) {
  p.groups = groups_at_once(p);
  p.group += group;
  if (p.hx) p.hx = static_cast<const T*>(p.hx) + group * p.hx_stride_group;
  return p;
}

// The ranks [begin, end) of one group.
struct Slice {
  int64_t group, begin, end;

  int64_t active(const Schedule& schedule, int64_t t) const {
    return std::max<int64_t>(0, std::min(end, schedule.active(t)) - begin);
  }
};

// Calls body(group, begin, end) for the ranks of the member's share of the slices' samples that are
// active at step t.
template <class Body>
void active_ranks(const Member& member, const Slice* slices, int64_t count,
                  const Schedule& schedule, int64_t t, Body body) {
  int64_t total = 0, first = 0;
  for (int64_t i = 0; i < count; i++) total += slices[i].active(schedule, t);
  const int64_t begin = member.begin(total), end = member.end(total);
  for (int64_t i = 0; i < count; i++) {
    const int64_t active = slices[i].active(schedule, t);
    const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, active);
    if (from < to) body(slices[i].group, slices[i].begin + from, slices[i].begin + to);
    first += active;
  }
}

// Calls body(group, rank) for each of these samples.
template <class Body>
void each_active(const Member& member, const Slice* slices, int64_t count, const Schedule& schedule,
                 int64_t t, Body body) {
  active_ranks(member, slices, count, schedule, t, [&](int64_t g, int64_t begin, int64_t end) {
    for (int64_t rank = begin; rank < end; rank++) body(g, rank);
  });
}

// Calls body(group, rank, find(group, rank)) for each of these samples; see with_statistics.
template <class Find, class Body>
void each_active(const Member& member, const Slice* slices, int64_t count, const Schedule& schedule,
                 int64_t t, Find find, Body body) {
  active_ranks(member, slices, count, schedule, t, [&](int64_t g, int64_t begin, int64_t end) {
    with_statistics(
        begin, end, [&](int64_t rank) { return find(g, rank); },
        [&](int64_t rank, const auto& found) { body(g, rank, found); });
  });
}

// Runs recurrence(member, slices, count) over all groups and samples: equal parts of the samples of
// their own for the members where that keeps all of them busy, otherwise everything for the team.
// Each part reads the weights for itself, so that there are as few as can be, and the smallest are
// for weights that L2 holds.
template <class Recurrence>
void share_samples(Member& member, const Problem& p, Recurrence recurrence) {
  const int64_t element = p.dtype == Dtype::float64 ? 8 : 4, size = member.size();
  const bool in_L2 = 3 * p.hidden * p.hidden * element <= 256 * 1024;
  const int64_t fewest = in_L2 ? 4 : 8, most = 128;  // samples of a part
  const int64_t even = size / std::gcd(size, p.groups);
  int64_t parts = (p.batch + most - 1) / most;  // of a group
  if (p.groups * parts < 4 * size) parts = (parts + even - 1) / even * even;
  if (parts == 1 || p.batch / parts >= fewest) {
    Member alone(0, 1, nullptr);
    for (int64_t i = member.begin(p.groups * parts); i < member.end(p.groups * parts); i++) {
      const int64_t part = i % parts;
      const Slice slice{i / parts, p.batch * part / parts, p.batch * (part + 1) / parts};
      recurrence(alone, &slice, 1);
    }
  } else {
    std::vector<Slice> slices;
    for (int64_t g = 0; g < p.groups; g++) slices.push_back({g, 0, p.batch});
    recurrence(member, slices.data(), p.groups);
  }
}

// A gate's matrix, of W_s the half for f or that for g: K columns of rows that are `stride` apart.
struct Half {
  Gate gate;
  int64_t first, K, stride;

  Half(const Problem& p, int64_t g, Gate gate, bool of_g = false)
      : gate(gate),
        first(of_g ? p.hidden : 0),
        K(gate == gate_f   ? p.group[g].input_size
          : gate == gate_g ? p.group[g].context_size
                           : p.hidden),
        stride(gate == gate_s ? 2 * p.hidden : K) {}
};

// Quantises a row for `project` where the weights are int8.
template <class T>
void quantize(const Problem& p, const T* row, int64_t K, T* quantized) {
  if constexpr (std::is_same_v<T, float>)
    if (p.weight_dtype == Dtype::int8) int8_in_use().quantize(row, K, quantized);
}

// c(m) = W q(m) with int8 weights; a member owns tiles of columns.
template <class RowsQ, class RowsC>
void project_int8(const Member& member, const Problem& p, int64_t g, const Half& half, RowsQ q,
                  int64_t M, RowsC c) {
  constexpr int64_t block = 64, tile = 8;
  const int64_t tiles = (p.hidden + tile - 1) / tile;
  const int64_t n = member.begin(tiles) * tile, end = std::min(member.end(tiles) * tile, p.hidden);
  const int8_t* const w = static_cast<const int8_t*>(p.group[g].weight[half.gate]) + half.first;
  const float* scale = p.group[g].scale + norm_row(half.gate, p.has_context) * p.hidden;
  for (int64_t m = 0; m < M; m += block) {
    const void* rows[block];
    float* results[block];
    const int64_t count = std::min(block, M - m);
    for (int64_t i = 0; i < count; i++) rows[i] = q(m + i), results[i] = c(m + i);
    int8_in_use().product(rows, count, w, half.stride, half.K, scale, n, end, results);
  }
}

// c(m) = W a(m), by panels where the call has packed them; of int8 weights q(m) is a(m), quantised.
template <class T, class RowsA, class RowsQ, class RowsC>
void project(const Member& member, const Problem& p, int64_t g, const Half& half, RowsA a, RowsQ q,
             int64_t M, const T* panels, RowsC c) {
  if (panels) return gemm<T>(member, a, 1, M, packed(panels, half.K), p.hidden, half.K, c);
  if constexpr (std::is_same_v<T, float>)
    if (p.weight_dtype == Dtype::int8) return project_int8(member, p, g, half, q, M, c);
  with_stored<T>(p.weight_dtype, p.group[g].weight[half.gate], [&](const auto* w) {
    dot<T>(member, a, M, w + half.first, half.stride, p.hidden, half.K, c);
  });
}

// Packs a gate's weights for `project`, where the call has panels.
template <class T>
void pack(const Member& member, const Problem& p, Gate gate, const Panels<T>& panels) {
  for (int64_t g = 0; g < p.groups; g++) {
    if (!panels(g)) return;
    const Half half(p, g, gate);
    with_stored<T>(p.weight_dtype, p.group[g].weight[gate], [&](const auto* w) {
      pack_transposed<T>(member, w, half.stride, half.K, p.hidden, panels(g));
    });
  }
}

// Packs what `forward_mix` begins with, unless the caller has; it packs the recurrence's weights in
// their place.
template <class T>
void pack_mix(const Member& member, const Problem& p, const ForwardPanels<T>& b) {
  if (p.packed) return;
  pack(member, p, gate_f, b.weight_f);
  if (p.has_context) pack(member, p, gate_s, b.weight_s);
}

template <class T>
void pack_recurrence(const Member& member, const Problem& p, const ForwardPanels<T>& b) {
  if (p.packed) return;
  pack(member, p, gate_r, b.weight_r);
  pack(member, p, gate_z, b.weight_z);
  pack(member, p, gate_h, b.weight_h);
}

// The input of a row of the schedule.
template <class T>
const T* input_row(const Group& group, const Schedule& schedule, int64_t row) {
  const int64_t rank = schedule.rank_of_row(row);
  const int64_t step = schedule.step(schedule.step_of_row[row], rank, group.reverse);
  return static_cast<const T*>(group.input) + step * group.input_stride_step +
         schedule.sample[rank] * group.input_stride_sample;
}

// A sample's row of output at a step.
template <class T>
T* output_row(const Results& results, int64_t g, int64_t t, int64_t sample) {
  return static_cast<T*>(results.output) + g * results.output_stride_group +
         t * results.output_stride_step + sample * results.output_stride_sample;
}

template <class T>
void forward_recurrence(Member& member, const Problem& p, const Schedule& schedule,
                        const ForwardBuffers<T>& b, const Saved<T>& saved, const Slice* slices,
                        int64_t count, const Results& results) {
  const int64_t H = p.hidden;
  for (int64_t t = 0; t < p.steps; t++) {
    const int64_t first = schedule.first_row[t];
    const auto step_row = [&](int64_t rank) { return b.keep ? first + rank : rank; };
    const auto product = [&](Gate gate, const Panels<T>& panels, const Table<T>& operand) {
      for (int64_t i = 0; i < count; i++) {
        const Slice& slice = slices[i];
        project<T>(
            member, p, slice.group, {p, slice.group, gate},
            [&](int64_t m) { return operand(slice.group, slice.begin + m); },
            [&](int64_t m) { return b.quantized(slice.group, slice.begin + m); },
            slice.active(schedule, t), panels(slice.group),
            [&](int64_t m) { return b.x_hat[gate](slice.group, step_row(slice.begin + m)); });
      }
    };
    if (t == 0) {
      each_active(member, slices, count, schedule, t, [&](int64_t g, int64_t rank) {
        const T *h = b.h(g, rank), *f = b.f_tilde(g, first + rank);
        T* u = b.u(g, rank);
        for (int64_t j = 0; j < H; j += lanes<T>) store(u + j, load(f + j) + load(h + j));
        quantize(p, u, H, b.quantized(g, rank));
      });
      member.barrier();
    }
    product(gate_r, b.weight_r, b.u);
    product(gate_z, b.weight_z, b.u);
    member.barrier();
    const auto of_r_and_z = [&](int64_t g, int64_t rank) {
      const int64_t row = step_row(rank);
      return std::pair(b.statistics(gate_r, g, row, p), b.statistics(gate_z, g, row, p));
    };
    const auto reset = [&](int64_t g, int64_t rank, const auto& found) {
      const int64_t row = step_row(rank);
      const auto [of_r, of_z] = found;
      T *x_r = b.x_hat[gate_r](g, row), *x_z = b.x_hat[gate_z](g, row);
      const Norm<T> norm_r = b.norms(g, gate_r), norm_z = b.norms(g, gate_z);
      const T *h = b.h(g, rank), *f = b.f_tilde(g, first + rank);
      T *v = b.v(g, rank), *z = b.z(g, rank);
      for (int64_t j = 0; j < H; j += lanes<T>) {
        const Vector<T> r = sigmoid(norm_r(of_r.normalize(x_r, j), j));  // Eq. 11
        store(z + j, sigmoid(norm_z(of_z.normalize(x_z, j), j)));        // Eq. 12
        store(v + j, r * load(h + j) + load(f + j));
      }
      quantize(p, v, H, b.quantized(g, rank));
    };
    each_active(member, slices, count, schedule, t, of_r_and_z, reset);
    member.barrier();
    product(gate_h, b.weight_h, b.v);
    member.barrier();
    const auto of_h = [&](int64_t g, int64_t rank) {
      return b.statistics(gate_h, g, step_row(rank), p);
    };
    const auto update = [&](int64_t g, int64_t rank, const Statistics<T>& found) {
      T* x_h = b.x_hat[gate_h](g, step_row(rank));
      const Norm<T> norm = b.norms(g, gate_h);
      const bool continues = rank < schedule.active(t + 1);
      const T* f_next = continues ? b.f_tilde(g, schedule.first_row[t + 1] + rank) : nullptr;
      const T* z = b.z(g, rank);
      T *h = b.h(g, rank), *u = b.u(g, rank);
      T* h_saved = p.keep == Keep::nothing ? nullptr : saved.h(g, first + rank);
      const int64_t step = schedule.step(t, rank, p.group[g].reverse);
      T* out = output_row<T>(results, g, step, schedule.sample[rank]);
      for (int64_t j = 0; j < H; j += lanes<T>) {
        const Vector<T> h_tilde = tanh(norm(found.normalize(x_h, j), j));       // Eq. 14
        const Vector<T> next = interpolate(load(z + j), h_tilde, load(h + j));  // Eq. 13
        store(h + j, next);
        store(out + j, next, H - j);
        if (h_saved) store(h_saved + j, next);
        if (f_next) store(u + j, load(f_next + j) + next);
      }
    };
    each_active(member, slices, count, schedule, t, of_h, update);
    member.barrier();
  }
}

// x_hat of f or g becomes f_bar or g_bar: Eq. 7 or 8. Each group has `count` rows.
template <class T>
void activate(const Member& member, const Problem& p, const ForwardBuffers<T>& b, Gate gate,
              const Table<T>& bar, const Table<T>& quantized, int64_t count) {
  const auto of_row = [&](int64_t i) { return b.statistics(gate, i / count, i % count, p); };
  const auto body = [&](int64_t i, const Statistics<T>& found) {
    const int64_t g = i / count, row = i % count;
    T *x = b.x_hat[gate](g, row), *target = bar(g, row);
    const Norm<T> norm = b.norms(g, gate);
    for (int64_t j = 0; j < p.hidden; j += lanes<T>)
      store(target + j, tanh(norm(found.normalize(x, j), j)));
    quantize(p, target, p.hidden, quantized(g, row));
  };
  with_statistics(member.begin(p.groups * count), member.end(p.groups * count), of_row, body);
}

// The context of a rank.
template <class T>
const T* context_row(const Group& group, const Schedule& schedule, int64_t rank) {
  return static_cast<const T*>(group.context) + schedule.sample[rank] * group.context_stride_sample;
}

// Quantises the operands of W_f or W_g where the weights are int8; a barrier has to follow.
template <class T>
void quantize_inputs(const Member& member, const Problem& p, const Schedule& schedule,
                     const ForwardBuffers<T>& b, bool inputs, bool contexts) {
  if (p.weight_dtype != Dtype::int8) return;
  const int64_t ranks = p.groups * p.batch;
  for (int64_t i = member.begin(ranks); i < member.end(ranks); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const Group& group = p.group[g];
    if (inputs)
      quantize(p, input_row<T>(group, schedule, rank), group.input_size, b.quantized(g, rank));
    if (contexts)
      quantize(p, context_row<T>(group, schedule, rank), group.context_size,
               b.quantized_context(g, rank));
  }
}

// W_g times the contexts, which `activate` makes g_bar of after a barrier.
template <class T>
void project_context(const Member& member, const Problem& p, const Schedule& schedule,
                     const ForwardBuffers<T>& b) {
  for (int64_t g = 0; g < p.groups; g++)
    project<T>(
        member, p, g, {p, g, gate_g},
        [&](int64_t rank) { return context_row<T>(p.group[g], schedule, rank); },
        [&](int64_t rank) { return b.quantized_context(g, rank); }, p.batch, nullptr,
        [&](int64_t rank) { return b.x_hat[gate_g](g, rank); });
}

// s_g, from g_bar.
template <class T>
void project_g_bar(const Member& member, const Problem& p, const ForwardBuffers<T>& b) {
  for (int64_t g = 0; g < p.groups; g++)
    project<T>(
        member, p, g, {p, g, gate_s, true}, [&](int64_t rank) { return b.g_bar(g, rank); },
        [&](int64_t rank) { return b.quantized_context(g, rank); }, p.batch, nullptr,
        [&](int64_t rank) { return b.s_g(g, rank); });
}

// g_bar and s_g of the contexts' shares, which the caller gives.
template <class T>
void read_share(const Member& member, const Problem& p, const Schedule& schedule,
                const ForwardBuffers<T>& b) {
  const int64_t H = p.hidden, ranks = p.groups * p.batch;
  for (int64_t i = member.begin(ranks); i < member.end(ranks); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const T* g_bar = static_cast<const T*>(p.group[g].share) + schedule.sample[rank] * H;
    std::copy_n(g_bar, H, b.g_bar(g, rank));
    std::copy_n(g_bar + p.batch * H, H, b.s_g(g, rank));
  }
}

// Writes the contexts' shares, [G, 2, B, H].
template <class T>
void context_share_team(Member& member, const Problem& p, const Schedule& schedule,
                        const ForwardBuffers<T>& b, T* share) {
  const int64_t H = p.hidden, ranks = p.groups * p.batch;
  b.norms.fill(member, p);
  if (p.weight_dtype == Dtype::int8) {
    quantize_inputs(member, p, schedule, b, false, true);
    member.barrier();
  }
  project_context(member, p, schedule, b);
  member.barrier();
  activate(member, p, b, gate_g, b.g_bar, b.quantized_context, p.batch);
  member.barrier();
  project_g_bar(member, p, b);
  member.barrier();
  for (int64_t i = member.begin(ranks); i < member.end(ranks); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    T* g_bar = share + (2 * g * p.batch + rank) * H;
    std::copy_n(b.g_bar(g, rank), H, g_bar);
    std::copy_n(b.s_g(g, rank), H, g_bar + p.batch * H);
  }
}

// Computes f_bar, g_bar, s and f_tilde of every row (Eq. 7-10; without context Eq. 7 alone), and
// packs the recurrence's weights; ends with a barrier.
template <class T>
void forward_mix(Member& member, const Problem& p, const Schedule& schedule,
                 const ForwardBuffers<T>& b) {
  const int64_t H = p.hidden, rows = schedule.rows();
  const bool computes_share = p.has_context && !p.group[0].share;
  for (int64_t g = 0; g < p.groups; g++) {
    const Group& group = p.group[g];
    project<T>(
        member, p, g, {p, g, gate_f},
        [&](int64_t row) { return input_row<T>(group, schedule, row); },
        [&](int64_t row) { return b.quantized(g, row); }, rows, b.weight_f(g),
        [&](int64_t row) { return b.x_hat[gate_f](g, row); });
  }
  if (computes_share) project_context(member, p, schedule, b);
  member.barrier();
  activate(member, p, b, gate_f, b.f_tilde, b.quantized, rows);
  if (!p.has_context) {
    pack_recurrence(member, p, b);
    member.barrier();
    return;
  }
  if (computes_share)
    activate(member, p, b, gate_g, b.g_bar, b.quantized_context, p.batch);
  else
    read_share(member, p, schedule, b);
  member.barrier();
  for (int64_t g = 0; g < p.groups; g++)
    project<T>(
        member, p, g, {p, g, gate_s}, [&](int64_t row) { return b.f_tilde(g, row); },
        [&](int64_t row) { return b.quantized(g, row); }, rows, b.weight_s(g),
        [&](int64_t row) { return b.x_hat[gate_s](g, row); });
  if (computes_share) project_g_bar(member, p, b);
  member.barrier();
  pack_recurrence(member, p, b);
  const auto of_s = [&](int64_t i) {
    const int64_t g = i / rows, row = i % rows;
    T* x = b.x_hat[gate_s](g, row);
    const T* s_g = b.s_g(g, schedule.rank_of_row(row));
    for (int64_t j = 0; j < H; j += lanes<T>) store(x + j, load(x + j) + load(s_g + j));
    return b.statistics(gate_s, g, row, p);
  };
  const auto mix = [&](int64_t i, const Statistics<T>& found) {
    const int64_t g = i / rows, row = i % rows;
    T *x = b.x_hat[gate_s](g, row), *f = b.f_tilde(g, row);
    const T* g_bar = b.g_bar(g, schedule.rank_of_row(row));
    const Norm<T> norm = b.norms(g, gate_s);
    for (int64_t j = 0; j < H; j += lanes<T>) {
      const Vector<T> y = norm(found.normalize(x, j), j);
      store(f + j, p.mix == Mix::concat
                       ? y
                       : interpolate(sigmoid(y), load(f + j), load(g_bar + j)));  // Eq. 9-10
    }
  };
  with_statistics(member.begin(p.groups * rows), member.end(p.groups * rows), of_s, mix);
  member.barrier();
}

// A sample's row of hx, or null.
template <class T>
const T* first_state(const Problem& p, int64_t g, int64_t sample) {
  const T* hx = static_cast<const T*>(p.hx);
  return hx ? hx + g * p.hx_stride_group + sample * p.hx_stride_sample : nullptr;
}

// Computes all that precedes the recurrence; ends with a barrier.
template <class T>
void forward_begin(Member& member, const Problem& p, const Schedule& schedule,
                   const ForwardBuffers<T>& b) {
  const int64_t H = p.hidden, states = p.groups * p.batch;
  b.norms.fill(member, p);
  pack_mix(member, p, b);
  quantize_inputs(member, p, schedule, b, true, p.has_context && !p.group[0].share);
  for (int64_t i = member.begin(states); i < member.end(states); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    T* h = b.h(g, rank);
    const T* h_0 = first_state<T>(p, g, schedule.sample[rank]);
    for (int64_t j = 0; j < H; j += lanes<T>)
      store(h + j, h_0 ? load(h_0 + j, H - j) : Vector<T>{});
  }
  member.barrier();
  forward_mix(member, p, schedule, b);
}

// Runs the recurrence of all groups and samples; ends with a barrier.
template <class T>
void forward_steps(Member& member, const Problem& p, const Schedule& schedule,
                   const ForwardBuffers<T>& b, const Saved<T>& saved, const Results& results) {
  share_samples(member, p, [&](Member& team, const Slice* slices, int64_t count) {
    forward_recurrence(team, p, schedule, b, saved, slices, count, results);
  });
  member.barrier();
}

template <class T>
void forward_team(Member& member, const Problem& p, const Schedule& schedule,
                  const ForwardBuffers<T>& b, const Saved<T>& saved, const Results& results) {
  const int64_t H = p.hidden, states = p.groups * p.batch;
  forward_begin(member, p, schedule, b);
  forward_steps(member, p, schedule, b, saved, results);
  if (p.keep != Keep::nothing) saved.clear_rest(member, p.groups, schedule.rows(), H);
  for (int64_t i = member.begin(states); i < member.end(states); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch, sample = schedule.sample[rank];
    T* h_n = static_cast<T*>(results.h_n) + (g * p.batch + sample) * H;
    for (int64_t j = 0; j < H; j += lanes<T>) store(h_n + j, load(b.h(g, rank) + j), H - j);
    for (int64_t t = schedule.length[rank]; t < p.steps; t++)
      std::fill_n(output_row<T>(results, g, t, sample), H, T(0));
  }
}

}  // namespace mmixer::cpu::MMIXER_ISA
