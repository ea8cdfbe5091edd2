// The layout of the two blocks of memory that a call works in: `saved`, which forward leaves for
// backward, and the workspace. One function lays each out, with or without memory, so that sizes
// and addresses cannot disagree.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "gemm.h"
#include "int8.h"
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

  // Gives each phase the memory from here on, as an arena of its own: what one phase takes, the
  // others overwrite. What is taken after this lies behind all of them.
  template <class... Phase>
  void share(Phase... phase) {
    int64_t end = used_;
    const auto take_all = [&](auto& take, Arena arena) {
      take(arena);
      end = std::max(end, arena.used_);
    };
    (take_all(phase, *this), ...);
    used_ = end;
  }

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
  // The table from this group on.
  Table from(int64_t group) const {
    Table rest = *this;
    if (data) rest.data += group * rows * width;
    return rest;
  }
};

// Forward's values that backward needs: the states, x_hat of each gate (without LayerNorm the
// pre-activation) and the norms' 1 / standard deviation. These are six tables of T x B rows and one
// of B; without context five of T x B.
template <class T>
struct Saved {
  Table<T> x_hat[gates], h;
  Table<T> r_std[gates];

  // Takes the tables that Problem::keep names, in one arena.
  Saved(T* memory, const Problem& p) : arena_(memory) {
    if (p.keep != Keep::nothing) h = Table<T>(arena_, p.groups, p.steps * p.batch, p.hidden);
    if (p.keep == Keep::gates) take_gates(arena_, p);
  }
  void take_gates(Arena<T>& arena, const Problem& p) {
    for (int gate = 0; gate < gates; gate++) {
      if (!has_gate(gate, p.has_context)) continue;
      const int64_t rows = gate == gate_g ? p.batch : p.steps * p.batch;
      x_hat[gate] = Table<T>(arena, p.groups, rows, p.hidden);
      r_std[gate] = Table<T>(arena, p.groups, 1, rows);
    }
  }
  int64_t size() const { return arena_.used(); }

  // What is saved from this group on.
  Saved from(int64_t group) const {
    Saved rest = *this;
    rest.h = h.from(group);
    for (int gate = 0; gate < gates; gate++) {
      rest.x_hat[gate] = x_hat[gate].from(group);
      rest.r_std[gate] = r_std[gate].from(group);
    }
    return rest;
  }

  // Writes zeros where no row was written and in the padding, so that equal calls leave equal bits.
  void clear_rest(const Member& member, int64_t groups, int64_t rows, int64_t hidden) const {
    const auto clear = [&](const Table<T>& table, int64_t used, int64_t size) {
      if (used == table.rows && size == table.width) return;
      for (int64_t i = member.begin(groups * table.rows); i < member.end(groups * table.rows);
           i++) {
        T* row = table(i / table.rows, i % table.rows);
        std::fill(i % table.rows < used ? row + size : row, row + table.width, T(0));
      }
    };
    clear(h, rows, hidden);
    for (int gate = 0; gate < gates; gate++) {
      clear(x_hat[gate], gate == gate_g ? x_hat[gate].rows : rows, hidden);
      clear(r_std[gate], 1, gate == gate_g ? x_hat[gate].rows : rows);
    }
  }

 private:
  Arena<T> arena_;
};

// Calls body with an operand's address in the type in which it is stored.
template <class T, class Body>
void with_stored(Dtype dtype, const void* operand, Body body) {
  if constexpr (sizeof(T) == sizeof(float))
    if (dtype == Dtype::bfloat16) return body(static_cast<const bfloat16*>(operand));
  body(static_cast<const T*>(operand));
}

// Scales and shifts of the norms, padded.
template <class T>
struct Norms {
  Table<T> scale, shift;
  bool enabled, has_context;

  Norms(Arena<T>& arena, const Problem& p)
      : scale(arena, p.groups, norm_rows(p.has_context), p.hidden),
        shift(arena, p.groups, norm_rows(p.has_context), p.hidden),
        enabled(p.group && p.group[0].norm_weight),
        has_context(p.has_context) {}

  Norm<T> operator()(int64_t group, Gate gate) const {
    const int row = norm_row(gate, has_context);
    return {scale(group, row), shift(group, row), enabled};
  }

  void fill(const Member& member, const Problem& p) const {
    for (int64_t i = member.begin(p.groups * scale.rows); i < member.end(p.groups * scale.rows);
         i++) {
      const int64_t g = i / scale.rows, row = i % scale.rows;
      if (enabled) {
        const int64_t first = row * p.hidden;
        const auto widen = [&](const void* norm, T* target) {
          with_stored<T>(p.norm_dtype, norm, [&](const auto* values) {
            for (int64_t j = 0; j < p.hidden; j += lanes<T>)
              store(target + j, load(values + first + j, p.hidden - j));
          });
        };
        widen(p.group[g].norm_weight, scale(g, row));
        widen(p.group[g].norm_bias, shift(g, row));
      } else {
        std::fill_n(scale(g, row), p.hidden, T(1));
        std::fill_n(shift(g, row), p.hidden, T(0));
      }
    }
  }
};

// The packed panels of one weight of each group, for gemm.
template <class T>
class Panels {
 public:
  Panels() = default;
  Panels(Arena<T>& arena, const Problem& p, int64_t K, int64_t N)
      : table_(arena, p.groups, 1, panels_size<T>(K, N)) {}

  T* operator()(int64_t group) const { return table_.data ? table_(group, 0) : nullptr; }

 private:
  Table<T> table_;
};

inline int64_t widest_input(const Problem& p) {
  int64_t widest = 0;
  for (int64_t g = 0; g < p.groups; g++) widest = std::max(widest, p.group[g].input_size);
  return widest;
}

inline int64_t widest_context(const Problem& p) {
  int64_t widest = 0;
  for (int64_t g = 0; g < p.groups && p.has_context; g++)
    widest = std::max(widest, p.group[g].context_size);
  return widest;
}

// The weights of forward's products with more than the context, of W_s the columns for f.
template <class T>
struct ForwardPanels {
  Panels<T> weight_f, weight_s, weight_r, weight_z, weight_h;

  void take_mix(Arena<T>& arena, const Problem& p) {
    weight_f = Panels<T>(arena, p, widest_input(p), p.hidden);
    if (p.has_context) weight_s = Panels<T>(arena, p, p.hidden, p.hidden);
  }
  void take_recurrence(Arena<T>& arena, const Problem& p) {
    for (Panels<T>* panels : {&weight_r, &weight_z, &weight_h})
      *panels = Panels<T>(arena, p, p.hidden, p.hidden);
  }
};

// The layout of Problem::packed.
template <class T>
struct Packed : ForwardPanels<T> {
  Arena<T> arena;

  Packed(T* memory, const Problem& p) : arena(memory) {
    arena.take(1);  // a line, which begins with the address of the Engine that packed
    this->take_mix(arena, p);
    this->take_recurrence(arena, p);
  }
};

template <class T>
struct ForwardBuffers : ForwardPanels<T> {  // no panels for a single step
  Arena<T> arena;
  Norms<T> norms;
  Table<T> f_tilde;     // per row: f_bar, then f_tilde
  Table<T> g_bar, s_g;  // per rank, with context; s_g = W_s's context half times g_bar
  Table<T> h, u, v, z;  // per rank: state, f_tilde + h, r h + f_tilde, update gate
  // The operands of int8 weights, quantised, per rank: of the context those of W_g and of W_s's
  // context half, else of all other products in turn.
  Table<T> quantized, quantized_context;
  Table<T> x_hat[gates];  // kept, or scratch: per row for f and s, else per rank
  Table<T> r_std[gates];  // empty unless x_hat is kept
  bool keep;

  // x_hat and r_std are kept where `saved` has room for them.
  ForwardBuffers(Arena<T> memory, const Problem& p, const Saved<T>& saved)
      : arena(memory), norms(arena, p), keep(saved.x_hat[gate_f].rows > 0) {
    const int64_t all = p.steps * p.batch;
    ForwardPanels<T>& panels = *this;
    if (p.steps > 1 && p.packed)
      panels = Packed<T>(static_cast<T*>(const_cast<void*>(p.packed)), p);
    else if (p.steps > 1)
      arena.share([&](Arena<T>& phase) { panels.take_mix(phase, p); },
                  [&](Arena<T>& phase) { panels.take_recurrence(phase, p); });
    f_tilde = Table<T>(arena, p.groups, all, p.hidden);
    for (Table<T>* table : {&h, &u, &v, &z}) *table = Table<T>(arena, p.groups, p.batch, p.hidden);
    if (p.has_context)
      for (Table<T>* table : {&g_bar, &s_g}) *table = Table<T>(arena, p.groups, p.batch, p.hidden);
    if (p.weight_dtype == Dtype::int8) {
      const auto take = [&](int64_t size) {
        const int64_t values = int8_row_bytes(std::max(size, p.hidden)) / int64_t(sizeof(T));
        return Table<T>(arena, p.groups, p.batch, values);
      };
      quantized = take(widest_input(p));
      if (p.has_context) quantized_context = take(widest_context(p));
    }
    if (keep) {
      for (int gate = 0; gate < gates; gate++) {
        x_hat[gate] = saved.x_hat[gate];
        r_std[gate] = saved.r_std[gate];
      }
    } else {
      // f_bar takes the place of its x_hat, unless that of s follows it there.
      x_hat[gate_f] = p.has_context ? Table<T>(arena, p.groups, all, p.hidden) : f_tilde;
      if (p.has_context) {
        x_hat[gate_s] = x_hat[gate_f];
        x_hat[gate_g] = Table<T>(arena, p.groups, p.batch, p.hidden);
      }
      for (Gate gate : {gate_r, gate_z, gate_h})
        x_hat[gate] = Table<T>(arena, p.groups, p.batch, p.hidden);
    }
  }

  // LayerNorm's statistics of a row of pre-activations.
  Statistics<T> statistics(Gate gate, int64_t g, int64_t row, const Problem& p) const {
    const Statistics<T> found(norms.enabled, x_hat[gate](g, row), p.hidden, T(p.eps));
    if (keep) r_std[gate](g, 0)[row] = found.r_std;
    return found;
  }
};

// A weight gradient packs so many chains of rows of T x B at a time, which bounds its memory.
constexpr int64_t reduction_chains = 4;

template <class T>
struct BackwardBuffers {
  Arena<T> arena;
  Norms<T> norms;
  Panels<T> weight_f, weight_g, weight_sf, weight_sg, weight_r, weight_z, weight_h;
  Table<T> f_bar, f_tilde;      // per row; one without context
  Table<T> da_r, da_z, da_h;    // per row
  Table<T> da_s;                // per row, with context: s, then da_s
  Table<T> df;                  // per row: df_tilde, df_bar, then da_f
  Table<T> h_0, dh, r, dv, du;  // per rank
  Table<T> g_bar;               // per rank, with context
  Table<T> dg, da_s_sum;        // also: dg_bar, then da_g; sum over t of da_s
  Table<T> norm_grad;           // per rank: the norms' rows x (scale, shift)
  T* right = nullptr;           // packed rows of a weight gradient

  BackwardBuffers(Arena<T> memory, const Problem& p, bool need_weights)
      : arena(memory), norms(arena, p) {
    const int64_t all = p.steps * p.batch, input = widest_input(p), context = widest_context(p);
    const auto recurrence = [&](Arena<T>& phase) {
      for (Panels<T>* panels : {&weight_r, &weight_z, &weight_h})
        *panels = Panels<T>(phase, p, p.hidden, p.hidden);
    };
    const auto mix = [&](Arena<T>& phase) {
      weight_f = Panels<T>(phase, p, p.hidden, input);
      if (!p.has_context) return;
      weight_g = Panels<T>(phase, p, p.hidden, context);
      weight_sf = Panels<T>(phase, p, p.hidden, p.hidden);
      weight_sg = Panels<T>(phase, p, p.hidden, p.hidden);
    };
    const auto weights = [&](Arena<T>& phase) {
      if (!need_weights) return;
      const int64_t rows = std::min(all, reduction_chains * chain);
      right = phase.take(panels_size<T>(rows, std::max({p.hidden, input, context})));
    };
    arena.share(recurrence, mix, weights);
    const auto take = [&](std::initializer_list<Table<T>*> tables, int64_t rows) {
      for (Table<T>* table : tables) *table = Table<T>(arena, p.groups, rows, p.hidden);
    };
    take({&f_tilde, &da_r, &da_z, &da_h, &df}, all);
    take({&h_0, &dh, &r, &dv, &du}, p.batch);
    f_bar = f_tilde;
    if (p.has_context) {
      take({&f_bar, &da_s}, all);
      take({&g_bar, &dg, &da_s_sum}, p.batch);
    }
    take({&norm_grad}, p.batch * norms.scale.rows * 2);
  }
  // Of a row of the norms; which is 0 for scale and 1 for shift.
  T* norm_gradient(int64_t group, int64_t rank, int64_t row, int which) const {
    return norm_grad(group, (rank * norms.scale.rows + row) * 2 + which);
  }
};

// A backward call's saved memory and workspace.
template <class T>
struct BackwardMemory {
  Saved<T> saved;
  std::optional<ForwardBuffers<T>> again;  // empty unless the gates are computed again
  std::optional<BackwardBuffers<T>> buffers;

  BackwardMemory(const Saved<T>& kept, T* workspace, const Problem& p, bool need_weights)
      : saved(kept) {
    Arena<T> arena(workspace);
    if (p.keep == Keep::states) {
      saved.take_gates(arena, p);
      again.emplace(arena, p, saved);
      arena = again->arena;
    }
    buffers.emplace(arena, p, need_weights);
  }
  int64_t size() const { return buffers->arena.used(); }
};

}  // namespace mmixer::cpu::MMIXER_ISA
