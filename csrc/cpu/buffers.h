// Where everything lies in the two blocks of memory that a call works in: `saved`, which forward
// leaves for backward, and the workspace. Laid out by one function each, with or without memory, so
// that sizes and addresses cannot disagree.
#pragma once

#include <algorithm>

#include "mcu.h"
#include "rows.h"
#include "team.h"

namespace mmixer::cpu::MMIXER_ISA {

// Hands out consecutive pieces; from null it only counts.
template <class T>
class Arena {
 public:
  explicit Arena(T* memory) : memory_(memory) {}

  T* take(int64_t size) {
    T* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += padded<T>(size);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* memory_;
  int64_t used_ = 0;
};

// A table of padded rows for each group.
template <class T>
struct Table {
  T* data = nullptr;
  int64_t rows = 0, width = 0;

  Table() = default;
  Table(Arena<T>& arena, int64_t groups, int64_t rows, int64_t size)
      : rows(rows), width(padded<T>(size)) {
    data = arena.take(groups * rows * width);
  }
  T* operator()(int64_t group, int64_t row) const { return data + (group * rows + row) * width; }
};

// What backward needs of forward: x_hat of each gate (without LayerNorm the pre-activation), the
// norms' 1 / standard deviation, and the states. Six tables of T x B rows and one of B.
template <class T>
struct Saved {
  Table<T> x_hat[gates], h;
  Table<T> r_std[gates];

  Saved(T* memory, const Problem<T>& p) : arena_(memory) {
    const int64_t all = p.steps * p.batch;
    h = Table<T>(arena_, p.groups, all, p.hidden);
    for (int gate = 0; gate < gates; gate++) {
      const int64_t rows = gate == G ? p.batch : all;
      x_hat[gate] = Table<T>(arena_, p.groups, rows, p.hidden);
      r_std[gate] = Table<T>(arena_, p.groups, 1, rows);
    }
  }
  int64_t size() const { return arena_.used(); }

  // Zeros where no row was written and in the padding, so that equal calls leave equal bits.
  void clear_rest(const Member& member, int64_t groups, int64_t rows, int64_t hidden) const {
    const auto clear = [&](const Table<T>& table, int64_t used, int64_t size) {
      for (int64_t i = member.begin(groups * table.rows); i < member.end(groups * table.rows); i++) {
        T* row = table(i / table.rows, i % table.rows);
        std::fill(i % table.rows < used ? row + size : row, row + table.width, T(0));
      }
    };
    clear(h, rows, hidden);
    for (int gate = 0; gate < gates; gate++) {
      clear(x_hat[gate], gate == G ? x_hat[gate].rows : rows, hidden);
      clear(r_std[gate], 1, gate == G ? x_hat[gate].rows : rows);
    }
  }

 private:
  Arena<T> arena_;
};

// Scales and shifts of the norms, padded.
template <class T>
struct Norms {
  Table<T> scale, shift;
  bool enabled;

  Norms(Arena<T>& arena, const Problem<T>& p)
      : scale(arena, p.groups, gates, p.hidden),
        shift(arena, p.groups, gates, p.hidden),
        enabled(p.group && p.group[0].norm_weight) {}

  Norm<T> operator()(int64_t group, Gate gate) const {
    return {scale(group, gate), shift(group, gate), enabled};
  }

  void fill(const Member& member, const Problem<T>& p) const {
    for (int64_t i = member.begin(p.groups * gates); i < member.end(p.groups * gates); i++) {
      const int64_t g = i / gates, gate = i % gates;
      if (enabled) {
        std::copy_n(p.group[g].norm_weight + gate * p.hidden, p.hidden, scale(g, gate));
        std::copy_n(p.group[g].norm_bias + gate * p.hidden, p.hidden, shift(g, gate));
      } else {
        std::fill_n(scale(g, gate), p.hidden, T(1));
        std::fill_n(shift(g, gate), p.hidden, T(0));
      }
    }
  }
};

template <class T>
struct ForwardBuffers {
  Arena<T> arena;
  Norms<T> norms;
  Table<T> f_tilde;             // f_bar, then f_tilde, of every row
  Table<T> g_bar, s_g;          // of every rank; s_g = W_s's context half times g_bar
  Table<T> h, u, v, z;          // of every rank: state, f_tilde + h, r h + f_tilde, update gate
  Table<T> x_hat[gates];        // saved, or scratch: of every row for f and s, of every rank else
  bool save;

  ForwardBuffers(T* workspace, const Problem<T>& p, const Saved<T>* saved)
      : arena(workspace), norms(arena, p), save(saved != nullptr) {
    const int64_t all = p.steps * p.batch;
    f_tilde = Table<T>(arena, p.groups, all, p.hidden);
    for (Table<T>* table : {&g_bar, &s_g, &h, &u, &v, &z})
      *table = Table<T>(arena, p.groups, p.batch, p.hidden);
    if (saved) {
      for (int gate = 0; gate < gates; gate++) x_hat[gate] = saved->x_hat[gate];
    } else {
      x_hat[F] = x_hat[S] = Table<T>(arena, p.groups, all, p.hidden);
      for (Gate gate : {G, R, Z, H}) x_hat[gate] = Table<T>(arena, p.groups, p.batch, p.hidden);
    }
  }
};

// Rows of T x B that a weight gradient transposes at a time: bounds its memory, and the length of
// the sums.
constexpr int64_t reduction_rows = 512;

template <class T>
struct BackwardBuffers {
  Arena<T> arena;
  Norms<T> norms;
  Table<T> weight_f, weight_g, weight_sf, weight_sg, weight_r, weight_z, weight_h;  // transposed
  Table<T> f_tilde;                    // of every row
  Table<T> da_r, da_z, da_h, da_s;     // of every row
  Table<T> df;                         // of every row: df_tilde, df_bar, then da_f
  Table<T> dg, da_s_sum;               // of every rank: dg_bar, then da_g; sum over t of da_s
  Table<T> g_bar, h_0, dh, r, dv, du;  // of every rank
  Table<T> norm_grad;                  // of every rank: 6 gates x (scale, shift)
  Table<T> left, right;                // transposed operands of a weight gradient

  BackwardBuffers(T* workspace, const Problem<T>& p, bool need_weights)
      : arena(workspace), norms(arena, p) {
    const int64_t all = p.steps * p.batch;
    int64_t widest = p.hidden, input = 0, context = 0;
    for (int64_t g = 0; g < p.groups; g++) {
      input = std::max(input, p.group[g].input_size);
      context = std::max(context, p.group[g].context_size);
    }
    widest = std::max({widest, input, context});
    weight_f = Table<T>(arena, p.groups, input, p.hidden);
    weight_g = Table<T>(arena, p.groups, context, p.hidden);
    for (Table<T>* table : {&weight_sf, &weight_sg, &weight_r, &weight_z, &weight_h})
      *table = Table<T>(arena, p.groups, p.hidden, p.hidden);
    for (Table<T>* table : {&f_tilde, &da_r, &da_z, &da_h, &da_s, &df})
      *table = Table<T>(arena, p.groups, all, p.hidden);
    for (Table<T>* table : {&dg, &da_s_sum, &g_bar, &h_0, &dh, &r, &dv, &du})
      *table = Table<T>(arena, p.groups, p.batch, p.hidden);
    norm_grad = Table<T>(arena, p.groups, p.batch * gates * 2, p.hidden);
    if (need_weights) {
      left = Table<T>(arena, 1, p.hidden, std::min(all, reduction_rows));
      right = Table<T>(arena, 1, widest, std::min(all, reduction_rows));
    }
  }
  T* norm_gradient(int64_t group, int64_t rank, Gate gate, int which) const {
    return norm_grad(group, (rank * gates + gate) * 2 + which);
  }
};

}  // namespace mmixer::cpu::MMIXER_ISA
