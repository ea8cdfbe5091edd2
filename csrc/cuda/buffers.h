// The layout of the two blocks of memory that a pass works in: `saved`, which forward leaves for
// backward, and the workspace. One function lays each out, with or without memory, so that sizes
// and addresses cannot disagree. Shapes are in the order of G, T, B and H; the operands of products
// are in Problem::dtype, all else in its wide dtype, if nothing else is said. order.h says in which
// order the steps lie.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "products.h"

namespace mmixer::cuda {

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

inline Dtype wide_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// The address of an element of an array, or null.
inline void* element(void* array, Dtype dtype, int64_t i) {
  return array ? static_cast<char*>(array) + i * bytes_of(dtype) : nullptr;
}
inline const void* element(const void* array, Dtype dtype, int64_t i) {
  return element(const_cast<void*>(array), dtype, i);
}

// Hands out pieces one behind the other. From null it only counts: the pieces are no memory, but
// not null either, as a layout that depends on what is there must be the same.
class Arena {
 public:
  explicit Arena(void* memory, int64_t alignment = 256)
      : memory_(memory ? reinterpret_cast<uintptr_t>(memory) : nowhere), alignment_(alignment) {}

  void* take(Dtype dtype, int64_t elements) { return take_bytes(elements * bytes_of(dtype)); }
  void* take_bytes(int64_t bytes) {
    void* const piece = reinterpret_cast<void*>(memory_ + used_);
    used_ += (bytes + alignment_ - 1) / alignment_ * alignment_;
    size_ = std::max(size_, used_);
    return piece;
  }
  int64_t used() const { return used_; }
  // What was taken since then and what will be taken now share memory, one after the other.
  void go_back_to(int64_t used) { used_ = used; }
  void go_on_behind_all() { used_ = size_; }
  int64_t size() const { return size_; }

 private:
  static constexpr uintptr_t nowhere = 256;

  uintptr_t memory_;
  int64_t alignment_, used_ = 0, size_ = 0;
};

// The sizes and dtypes of a problem, by their short names.
struct Sizes {
  int64_t G, T, B, H, rows;  // rows = T B
  int64_t sequence, state;   // elements of [G, T, B, H] and of [G, B, H]
  Dtype operand, wide;
  bool has_norm, has_context;

  explicit Sizes(const Problem& p)
      : G(p.groups),
        T(p.steps),
        B(p.batch),
        H(p.hidden),
        rows(T * B),
        sequence(G * rows * H),
        state(G * B * H),
        operand(p.dtype),
        wide(wide_dtype(p.dtype)),
        has_norm(p.group[0].norm_weight),
        has_context(p.has_context) {}

  void* take_operands(Arena& arena, int64_t elements) const {
    return arena.take(operand, elements);
  }
  void* take_wide(Arena& arena, int64_t elements) const { return arena.take(wide, elements); }
};

// The activations of Eq. 7-10. Without context a_f and f_tilde, which is f_bar, are all.
struct Prologue {
  void *a_f, *f_bar, *a_s;      // [G, T, B, H]; f_bar is an operand
  void *a_g, *g_bar, *context;  // [G, B, H]; likewise g_bar; context: W_s's half of it times g_bar
  void* f_tilde;                // an operand: [T, B, H] of each weight set
  int64_t f_tilde_stride_group;

  void take(Arena& arena, const Sizes& s, bool with_f_tilde) {
    a_f = s.take_wide(arena, s.sequence);
    if (s.has_context) {
      a_s = s.take_wide(arena, s.sequence);
      a_g = s.take_wide(arena, s.state), context = s.take_wide(arena, s.state);
      f_bar = s.take_operands(arena, s.sequence), g_bar = s.take_operands(arena, s.state);
    }
    f_tilde = with_f_tilde ? s.take_operands(arena, s.sequence) : nullptr;
    f_tilde_stride_group = s.rows * s.H;
  }
};

// With Keep::states it is the states alone, and the prologue is empty. Nothing lies between the
// arrays, the wide ones of which come first: equal calls leave equal bits.
struct Saved {
  Arena arena;
  void* states = nullptr;  // [G, T, B, H]
  Prologue prologue{};
  void* rest = nullptr;  // an operand behind all, where that is no multiple of the wide dtype
  int64_t size;          // in elements of the wide dtype

  Saved(const void* memory, const Problem& p) : arena(const_cast<void*>(memory), 1) {
    const Sizes s(p);
    if (p.keep != Keep::nothing) states = s.take_wide(arena, s.sequence);
    if (p.keep == Keep::gates) prologue.take(arena, s, true);
    if (arena.used() % bytes_of(s.wide)) rest = s.take_operands(arena, 1);
    size = arena.used() / bytes_of(s.wide);
  }
};

// Rows in memory.
struct Matrix {
  const void* p;
  int64_t stride;  // in elements
};

// The matrices that products read besides the activations, a row-major one per weight set: where
// they lie with the caller, or copied. `copies` makes the copies. Without context nothing of it is
// there.
//
// What has the size of a weight or of a context is copied where that makes one product of all
// weight sets, W_f where all have one input, as both directions do; everything is where its dtype
// is not the operands' or its rows are not evenly apart, and inputs where lengths mask them.
class Sources {
 public:
  std::vector<Matrix> input, context;      // [T B, input_size], [B, context_size]
  std::vector<Matrix> weight_f, weight_g;  // [H, input_size], [H, context_size]
  Matrix weight_s, wide_weight_sg;         // [G][H, 2H]; its g half, wide: [G][H, H], for backward
  bool one_context;                        // contexts and W_g of all sets go into one product
  bool one_input;                          // likewise an input that all sets have, and W_f
  std::vector<Copy> copies;

  // inputs: input and context are read.
  Sources(Arena& arena, const Problem& p, bool inputs, bool backward)
      : weight_s{}, wide_weight_sg{}, one_context(p.has_context), one_input(p.groups > 1) {
    const Sizes s(p);
    for (int64_t g = 0; g < s.G; g++) {
      one_context = one_context && p.group[g].context_size == p.group[0].context_size;
      one_input = one_input && has_same_input(p.group[g], p.group[0]);
    }
    const bool stacked = s.G > 1 && one_context, stored = p.weight_dtype == p.dtype;
    const Dtype wide = s.wide;
    void *contexts = nullptr, *weights_g = nullptr, *weights_s = nullptr, *weights_sg = nullptr;
    const bool has_prologue = !backward || p.keep != Keep::gates;  // which has x W_f^T
    void* const weights_f = one_input && has_prologue
                                ? s.take_operands(arena, s.G * s.H * p.group[0].input_size)
                                : nullptr;
    const int64_t C = p.group[0].context_size;
    if (stacked) {
      if (inputs) contexts = s.take_operands(arena, s.G * s.B * C);
      weights_g = s.take_operands(arena, s.G * s.H * C);
    }
    const bool copy_s = s.has_context && (s.G > 1 || !stored);
    const bool copy_sg = s.has_context && backward && wide != p.dtype;
    if (copy_s) weights_s = s.take_operands(arena, s.G * s.H * 2 * s.H);
    if (copy_sg) weights_sg = s.take_wide(arena, s.G * s.H * s.H);
    for (int64_t g = 0; g < s.G; g++) {
      const Group& group = p.group[g];
      const int64_t F = group.input_size, C = group.context_size;
      const auto weight = [&](Gate gate) { return group.weight[gate]; };
      const auto matrix = [&](Gate gate, int64_t columns, void* target) {
        if (!target && stored) return Matrix{weight(gate), columns};
        if (!target) target = s.take_operands(arena, s.H * columns);
        add({weight(gate), target, 1, s.H, columns, 0, columns, 0, columns, nullptr, p.weight_dtype,
             p.dtype, 0});
        return Matrix{target, columns};
      };
      weight_f.push_back(matrix(gate_f, F, element(weights_f, p.dtype, g * s.H * F)));
      if (s.has_context)
        weight_g.push_back(matrix(gate_g, C, element(weights_g, p.dtype, g * s.H * C)));
      const int64_t size_s = 2 * s.H * s.H;
      if (copy_s) matrix(gate_s, 2 * s.H, element(weights_s, p.dtype, g * size_s));
      if (copy_sg)
        add({element(weight(gate_s), p.weight_dtype, s.H), element(weights_sg, wide, g * s.H * s.H),
             1, s.H, s.H, 0, 2 * s.H, 0, s.H, nullptr, p.weight_dtype, wide, 0});
      if (!inputs) continue;
      input.push_back(g > 0 && one_input ? input.front() : input_of(arena, p, s, group));
      if (!s.has_context) continue;
      context.push_back({group.context, group.context_stride_sample});
      if (stacked || !may_be_read(context.back(), s.B, C)) {
        void* const target =
            stacked ? element(contexts, p.dtype, g * s.B * C) : s.take_operands(arena, s.B * C);
        add({group.context, target, 1, s.B, C, 0, group.context_stride_sample, 0, C, nullptr,
             p.dtype, p.dtype, 0});
        context.back() = {target, C};
      }
    }
    if (!s.has_context) return;
    weight_s = {copy_s ? weights_s : p.group[0].weight[gate_s], 2 * s.H};
    wide_weight_sg =
        copy_sg ? Matrix{weights_sg, s.H} : Matrix{element(weight_s.p, p.dtype, s.H), 2 * s.H};
  }

 private:
  void add(const Copy& copy) { copies.push_back(copy); }

  static bool has_same_input(const Group& a, const Group& b) {
    return a.input == b.input && a.input_size == b.input_size &&
           a.input_stride_step == b.input_stride_step &&
           a.input_stride_sample == b.input_stride_sample;
  }

  Matrix input_of(Arena& arena, const Problem& p, const Sizes& s, const Group& group) {
    const int64_t F = group.input_size;
    Matrix input = {group.input,
                    s.T > 1 && s.B == 1 ? group.input_stride_step : group.input_stride_sample};
    const bool even =
        s.T == 1 || s.B == 1 || group.input_stride_step == s.B * group.input_stride_sample;
    if (!p.lengths && even && may_be_read(input, s.rows, F)) return input;
    void* const target = s.take_operands(arena, s.rows * F);
    add({group.input, target, s.T, s.B, F, group.input_stride_step, group.input_stride_sample,
         s.B * F, F, p.lengths, p.dtype, p.dtype, 0});
    return {target, F};
  }

  // Products take no rows that overlap. A single row may have any stride.
  static bool may_be_read(Matrix& matrix, int64_t rows, int64_t columns) {
    if (rows == 1) matrix.stride = columns;
    return matrix.stride >= columns;
  }
};

// What prepare makes of the recurrent weights and the norms, and the initial states.
struct Prepared {
  void* norms;          // NormTable's memory; null without LayerNorm
  void* matrices;       // [G, 3, H, H], operands
  void* split_weights;  // PrepareArguments::split_weights; null on path step
  void* packets;        // of the teams that run at once
  int64_t packets_size;
  void* hx;  // [G, B, H]; null for zeros

  Prepared(Arena& arena, const Problem& p, const PassPlan& plan, bool backward) {
    const Sizes s(p);
    norms = s.has_norm ? s.take_wide(arena, 2 * s.G * norm_rows(s.has_context) * s.H) : nullptr;
    matrices = s.take_operands(arena, s.G * step_gates * s.H * s.H);
    split_weights = packets = nullptr;
    packets_size = 0;
    if (plan.path != Path::step) {
      const int64_t padded = padded_size(plan, int(s.H), backward);
      const int64_t teams = s.G * ((s.B + plan.samples - 1) / plan.samples);
      packets_size =
          cuda::packets_size(plan, std::min<int64_t>(teams, plan.teams), int(s.H), backward);
      split_weights = arena.take(Dtype::bfloat16, s.G * plan.terms * step_gates * padded * padded);
      packets = arena.take_bytes(packets_size);
    }
    hx = p.hx ? s.take_wide(arena, s.state) : nullptr;
  }
};

struct ForwardBuffers {
  Arena arena;
  void* products;
  Prepared prepared;
  Sources sources;
  Prologue prologue;
  void* input_gates;  // [G, T, B, 3, H]
  // On path step, of one step: the state and r h as operands, [G, B, H]; the products with them,
  // [G, B, 2, H] and [G, B, H]; the state where states are not kept, [G, B, H].
  void *operand, *r_h, *state_gates, *candidate, *state;

  ForwardBuffers(void* memory, const Problem& p, const PassPlan& plan, const Saved& saved)
      : arena(memory),
        products(arena.take_bytes(product_workspace_bytes)),
        prepared(arena, p, plan, false),
        sources(arena, p, true, false),
        prologue(saved.prologue) {
    const Sizes s(p);
    if (!prologue.f_tilde) {
      void* const f_tilde = s.take_operands(arena, s.sequence);
      const int64_t used = arena.used();
      prologue.take(arena, s, false);
      prologue.f_tilde = f_tilde;
      arena.go_back_to(used);  // the input gates need f_tilde alone
    }
    input_gates = s.take_wide(arena, step_gates * s.sequence);
    arena.go_on_behind_all();
    if (plan.path != Path::step) return;
    operand = s.take_operands(arena, s.state), r_h = s.take_operands(arena, s.state);
    state_gates = s.take_wide(arena, 2 * s.state), candidate = s.take_wide(arena, s.state);
    state = s.take_wide(arena, s.state);
  }
};

// The summands of each norm's gradient: the blocks of a kernel that sums over rows.
constexpr int64_t most_summands = 256;

struct BackwardBuffers {
  Arena arena;
  void* products;
  Prepared prepared;
  Sources sources;
  Prologue prologue;
  // Operands, [G, 3, T, B, H]: the state before each step, f_tilde and r h. Each is dead when x_hat
  // of r, z or h is written, which thus takes its memory, as an operand.
  void* operands;
  void* zeros;            // an operand's row, for cotangents that are zero
  void* unwanted;         // an operand: the gradient of hx, [G, B, H], where the caller gets none
  void *x_hat, *r_std;    // [G, 3, T, B, H] and [G, 3, T, B]; x_hat: operands where these are wide
  void* weight_operands;  // operands, [G, 3, T, B, H]: of W_r, W_z and W_h
  // What is of g or s, here and below, is null without context.
  void *grad_a_s = nullptr, *grad_a_f;                                     // operands, [G, T, B, H]
  void* grad_a_g = nullptr;                                                // an operand, [G, B, H]
  void *grad_a_s_sum = nullptr, *grad_g_sum = nullptr, *grad_g = nullptr;  // [G, B, H]
  void* grad_norm[gate_r];           // [G, n, 2, H] of f, g and s; null if not wanted
  void* grad_norm_recurrence;        // [G, 2, 3, B, H]; likewise
  void* grad_matrices;               // [G, 3, H, H], wide; likewise
  std::vector<void*> grad_weight_f;  // [H, input_size], wide; null where the product
                                     // writes what the caller gets, as all below
  void* grad_weight_sf;              // [G, H, H], wide
  void* grad_contexts;               // an operand: [G, B, context_size]
  // Uses of the same memory, one after another. W_r and W_z times the first two operands and W_h
  // times the last two: [G, 2, T, B, 2, H] and [G, 2, T, B, H].
  void *gate_products, *candidate_products;
  // Then V, like x_hat, where the gradients of f_bar and g_bar, [G, T, B, H], come afterwards; and
  // behind it da of r, z and h, an operand, [G, 3, T, B, H], and the gradient of f_tilde.
  void *projected, *grad_f, *grad_f_bar, *grad_g_bar;
  void *grad_gates, *grad_f_tilde;
  // On path step, of one step, wide: [G, B, H]; da, an operand: [G, B, 3, H].
  void *grad_h, *carry, *grad_r_h, *grad_sum, *step_operand;

  BackwardBuffers(void* memory, const Problem& p, const PassPlan& plan, const Saved& saved,
                  bool need_weights)
      : arena(memory),
        products(arena.take_bytes(product_workspace_bytes)),
        prepared(arena, p, plan, true),
        sources(arena, p, need_weights || p.keep != Keep::gates, true),
        prologue(saved.prologue) {
    const Sizes s(p);
    const int64_t all = step_gates * s.sequence;
    const bool gated = s.has_context && p.mix == Mix::gated, is_wide = s.operand == s.wide;
    if (p.keep != Keep::gates) prologue.take(arena, s, false);
    operands = s.take_operands(arena, all);
    zeros = s.take_operands(arena, s.H), unwanted = s.take_operands(arena, s.state);
    if (p.keep != Keep::gates) {
      prologue.f_tilde = element(operands, s.operand, s.rows * s.H);
      prologue.f_tilde_stride_group = step_gates * s.rows * s.H;
    }
    x_hat = is_wide ? operands : s.take_wide(arena, all);
    r_std = s.take_wide(arena, step_gates * s.G * s.rows);
    weight_operands = need_weights ? s.take_operands(arena, all) : nullptr;
    if (s.has_context) grad_a_s = s.take_operands(arena, s.sequence);
    grad_a_f = s.take_operands(arena, s.sequence);
    if (s.has_context) {
      grad_a_g = s.take_operands(arena, s.state);
      for (void** x : {&grad_a_s_sum, &grad_g_sum, &grad_g}) *x = s.take_wide(arena, s.state);
    }
    take_weights(p, s, need_weights);

    const int64_t used = arena.used();
    gate_products = s.take_wide(arena, 4 * s.sequence);
    candidate_products = s.take_wide(arena, 2 * s.sequence);
    arena.go_back_to(used);
    projected = s.take_wide(arena, all);
    grad_gates = s.take_operands(arena, all);
    grad_f_tilde = s.take_wide(arena, s.sequence);
    grad_f = s.has_context ? projected : grad_f_tilde;
    grad_f_bar = gated ? element(projected, s.wide, s.sequence) : nullptr;
    grad_g_bar = gated ? element(projected, s.wide, 2 * s.sequence) : nullptr;
    arena.go_on_behind_all();
    if (plan.path != Path::step) return;
    for (void** x : {&grad_h, &carry, &grad_r_h, &grad_sum}) *x = s.take_wide(arena, s.state);
    step_operand = s.take_operands(arena, step_gates * s.state);
  }

  static int64_t summands(const Sizes& s, int gate) {
    return std::min(gate == gate_g ? s.B : s.rows, most_summands);
  }

 private:
  void take_weights(const Problem& p, const Sizes& s, bool need_weights) {
    const bool direct = p.weight_dtype == s.wide || p.weight_dtype == s.operand;
    const bool stacked = s.G > 1 && sources.one_context, has_norm = s.has_norm && need_weights;
    for (int gate = gate_f; gate < gate_r; gate++)
      grad_norm[gate] = has_norm && has_gate(gate, s.has_context)
                            ? s.take_wide(arena, s.G * summands(s, gate) * 2 * s.H)
                            : nullptr;
    grad_norm_recurrence =
        has_norm ? s.take_wide(arena, s.G * 2 * step_gates * s.B * s.H) : nullptr;
    const int64_t C = p.group[0].context_size;
    grad_contexts = stacked ? s.take_operands(arena, s.G * s.B * C) : nullptr;
    grad_matrices = grad_weight_sf = nullptr;
    grad_weight_f.resize(s.G);
    if (!need_weights) return;
    grad_matrices = s.take_wide(arena, s.G * step_gates * s.H * s.H);
    if (s.has_context && (s.G > 1 || !direct)) grad_weight_sf = s.take_wide(arena, s.G * s.H * s.H);
    if (!direct || sources.one_input)
      for (int64_t g = 0; g < s.G; g++) {
        const int64_t size = s.H * p.group[g].input_size;
        if (!sources.one_input)
          grad_weight_f[g] = s.take_wide(arena, size);
        else if (g == 0)
          grad_weight_f[g] = s.take_wide(arena, s.G * size);
        else
          grad_weight_f[g] = element(grad_weight_f[0], s.wide, g * size);
      }
  }
};

}  // namespace mmixer::cuda
