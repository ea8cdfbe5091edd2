// The backward pass: the recurrence in reverse, then the mix and the projections of all steps at
// once, then the weight gradients as one product over T x B each.
//
// A step has two dependent products: W_h^T da_h gives dv (v = r h + f_tilde), then W_r^T da_r +
// W_z^T da_z gives du (u = f_tilde + h). Where forward saved only the states, the gates of all
// steps are computed again first, to the same bits. Gradients of scale and shift are summed for
// each sample on its own and then over samples: no order depends on the threads. The bound is
// forward's.
#pragma once

#include "forward.h"

namespace mmixer::cpu::MMIXER_ISA {

// A weight gradient: target[i][j] = sum over rows m of da(m)[i] * x(m)[j], i < H, j < columns.
template <class T>
struct WeightGradient {
  const Table<T>& da;
  T* target;
  int64_t target_stride;
};

// Those of one x, of group g. x(first, count) gives that many rows of x from the first on, as an
// Operand; it may begin with a barrier, and end with one.
template <class T, class RowsX>
void weight_gradients(const Member& member, std::initializer_list<WeightGradient<T>> gradients,
                      int64_t g, RowsX x, int64_t rows, int64_t H, int64_t columns) {
  in_parts(0, (rows + chain - 1) / chain, reduction_chains, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * chain, count = std::min(end * chain, rows) - first;
    const Operand<T> right = x(first, count);
    for (const WeightGradient<T>& gradient : gradients)
      gemm<T>(
          member, [da = gradient.da(g, first)](int64_t i) { return da + i; }, gradient.da.width, H,
          right, columns, count,
          [&](int64_t i) { return gradient.target + i * gradient.target_stride; }, first > 0);
  });
}

// A backward call; its phases, in the order of `run`, share what it is made of.
template <class T>
struct Backward {
  const Problem& p;
  const Schedule& schedule;
  const Saved<T>& saved;
  const BackwardBuffers<T>& b;
  const ForwardBuffers<T>* again;  // null unless the gates are computed again
  const Cotangents& cotangents;
  const GroupGradient* gradient;  // [G]
  T* grad_hx;

  void run(Member& member) const {
    prepare(member);
    share_samples(member, p, [&](Member& team, const Slice* slices, int64_t count) {
      recurrence(team, slices, count);
    });
    member.barrier();
    mix(member);
    member.barrier();
    if (gradient[0].weight[0]) weights(member);
  }

 private:
  const T* x_hat(Gate gate, int64_t g, int64_t row) const { return saved.x_hat[gate](g, row); }
  T r_std(Gate gate, int64_t g, int64_t row) const { return saved.r_std[gate](g, 0)[row]; }

  // Null where the gradient is zero.
  const T* grad_output(int64_t g, int64_t t, int64_t rank) const {
    const Cotangents& o = cotangents;
    if (!o.grad_output) return nullptr;
    return static_cast<const T*>(o.grad_output) + g * o.grad_output_stride_group +
           schedule.step(t, rank, p.group[g].reverse) * o.grad_output_stride_step +
           schedule.sample[rank] * o.grad_output_stride_sample;
  }
  const T* grad_h_n(int64_t g, int64_t sample) const {
    const Cotangents& o = cotangents;
    if (!o.grad_h_n) return nullptr;
    return static_cast<const T*>(o.grad_h_n) + g * o.grad_h_n_stride_group +
           sample * o.grad_h_n_stride_sample;
  }

  // The state with which step t began.
  const T* h_before(int64_t g, int64_t t, int64_t rank) const {
    return t == 0 ? b.h_0(g, rank) : saved.h(g, schedule.first_row[t - 1] + rank);
  }

  // dy becomes da, in place.
  void through_norm(Gate gate, T* dy, int64_t g, int64_t row, int64_t rank) const {
    const int norm = norm_row(gate, p.has_context);
    normalize_backward(b.norms(g, gate), dy, x_hat(gate, g, row), r_std(gate, g, row),
                       b.norm_gradient(g, rank, norm, 0), b.norm_gradient(g, rank, norm, 1),
                       p.hidden);
  }

  // Computes x_hat and r_std of all gates from the states, in forward's own order; ends with a
  // barrier.
  void compute_gates_again(Member& member) const {
    const ForwardBuffers<T>& f = *again;
    const int64_t H = p.hidden;
    const Table<T>& operand = b.da_r;  // u, then v: not in use yet
    const int64_t rows = schedule.rows();
    const auto each_row = [&](auto body) {
      for (int64_t i = member.begin(p.groups * rows); i < member.end(p.groups * rows); i++) {
        const int64_t g = i / rows, row = i % rows, rank = schedule.rank_of_row(row);
        body(g, row, h_before(g, schedule.step_of_row[row], rank), f.f_tilde(g, row),
             operand(g, row));
      }
      member.barrier();
    };
    const auto product = [&](Gate gate, const Panels<T>& panels) {
      for (int64_t g = 0; g < p.groups; g++) {
        const auto a = [&](int64_t row) { return operand(g, row); };
        project<T>(member, p, g, {p, g, gate}, a, a, rows, panels(g),  // never of int8 weights
                   [&](int64_t row) { return f.x_hat[gate](g, row); });
      }
    };
    f.norms.fill(member, p);
    pack_mix(member, p, f);
    member.barrier();
    forward_mix(member, p, schedule, f);
    each_row([&](int64_t, int64_t, const T* h, const T* f_tilde, T* u) {
      for (int64_t j = 0; j < H; j += lanes<T>) store(u + j, load(f_tilde + j) + load(h + j));
    });
    product(gate_r, f.weight_r);
    product(gate_z, f.weight_z);
    member.barrier();
    each_row([&](int64_t g, int64_t row, const T* h, const T* f_tilde, T* v) {
      T *x_r = f.x_hat[gate_r](g, row), *x_z = f.x_hat[gate_z](g, row);
      const Statistics<T> of_r = f.statistics(gate_r, g, row, p),
                          of_z = f.statistics(gate_z, g, row, p);
      const Norm<T> norm = f.norms(g, gate_r);
      for (int64_t j = 0; j < H; j += lanes<T>) {
        const Vector<T> r = sigmoid(norm(of_r.normalize(x_r, j), j));
        of_z.normalize(x_z, j);
        store(v + j, r * load(h + j) + load(f_tilde + j));
      }
    });
    product(gate_h, f.weight_h);
    member.barrier();
    each_row([&](int64_t g, int64_t row, const T*, const T*, T*) {
      const Statistics<T> of_h = f.statistics(gate_h, g, row, p);
      for (int64_t j = 0; j < H; j += lanes<T>) of_h.normalize(f.x_hat[gate_h](g, row), j);
    });
  }

  // Whether a product of so many rows reads weights where they lie, as few rows do not pay for a
  // copy.
  bool are_in_place(const Half& half, int64_t rows) const {
    const bool are_whole_vectors = half.K % lanes<T> == 0;
    return are_whole_vectors && rows <= 512 && (sizeof(T) == 8 || p.weight_dtype == p.dtype);
  }

  void pack(const Member& member, int64_t g, const Half& half, int64_t rows,
            const Panels<T>& panels) const {
    if (are_in_place(half, rows)) return;
    with_stored<T>(p.weight_dtype, p.group[g].weight[half.gate], [&](const auto* w) {
      const auto row = [&](int64_t k) {
        return [=, K = half.K, x = w + half.first + k * half.stride](int64_t n) {
          return load(x + n, K - n);
        };
      };
      pack_rows<T>(member, row, p.hidden, half.K, panels(g));
    });
  }

  Operand<T> operand(int64_t g, const Half& half, int64_t rows, const Panels<T>& panels) const {
    if (!are_in_place(half, rows)) return packed(panels(g), p.hidden);
    return in_place(static_cast<const T*>(p.group[g].weight[half.gate]) + half.first, half.stride);
  }

  // The rows of all products with W_r, W_z or W_h, whose weights each step reads: no limit but for
  // one step.
  int64_t recurrent_rows() const { return p.steps == 1 ? p.batch : INT64_MAX; }

  // Makes the recurrence's packed weights, and the states and mixed features that the phases read;
  // ends with a barrier.
  void prepare(Member& member) const {
    const int64_t H = p.hidden;
    b.norms.fill(member, p);
    for (int64_t g = 0; g < p.groups; g++) {
      pack(member, g, Half(p, g, gate_r), recurrent_rows(), b.weight_r);
      pack(member, g, Half(p, g, gate_z), recurrent_rows(), b.weight_z);
      pack(member, g, Half(p, g, gate_h), recurrent_rows(), b.weight_h);
    }
    for (int64_t i = member.begin(p.groups * p.batch); i < member.end(p.groups * p.batch); i++) {
      const int64_t g = i / p.batch, rank = i % p.batch;
      const T* h_0 = first_state<T>(p, g, schedule.sample[rank]);
      T* h = b.h_0(g, rank);
      for (int64_t j = 0; j < H; j += lanes<T>)
        store(h + j, h_0 ? load(h_0 + j, H - j) : Vector<T>{});
      const int64_t norms = norm_rows(p.has_context);
      std::fill_n(b.norm_gradient(g, rank, 0, 0), norms * 2 * b.norm_grad.width, T(0));
      std::fill_n(b.dh(g, rank), b.dh.width, T(0));
      if (!p.has_context) continue;
      std::fill_n(b.dg(g, rank), b.dg.width, T(0));
      std::fill_n(b.da_s_sum(g, rank), b.da_s_sum.width, T(0));
    }
    member.barrier();
    if (again) compute_gates_again(member);
    if (p.has_context)
      prepare_mix(member);
    else
      prepare_f_bar(member);
    member.barrier();
  }

  void prepare_f_bar(const Member& member) const {
    const int64_t rows = schedule.rows();
    for (int64_t i = member.begin(p.groups * rows); i < member.end(p.groups * rows); i++) {
      const int64_t g = i / rows, row = i % rows;
      const Norm<T> norm = b.norms(g, gate_f);
      const T* x = x_hat(gate_f, g, row);
      T* f_bar = b.f_bar(g, row);
      for (int64_t j = 0; j < p.hidden; j += lanes<T>) store(f_bar + j, tanh(norm(x, j)));
    }
  }

  void prepare_mix(Member& member) const {
    const int64_t H = p.hidden;
    for (int64_t i = member.begin(p.groups * p.batch); i < member.end(p.groups * p.batch); i++) {
      const int64_t g = i / p.batch, rank = i % p.batch;
      const Norm<T> norm = b.norms(g, gate_g);
      for (int64_t j = 0; j < H; j += lanes<T>)
        store(b.g_bar(g, rank) + j, tanh(norm(x_hat(gate_g, g, rank), j)));
    }
    member.barrier();
    const int64_t rows = schedule.rows();
    for (int64_t i = member.begin(p.groups * rows); i < member.end(p.groups * rows); i++) {
      const int64_t g = i / rows, row = i % rows;
      const Norm<T> norm_f = b.norms(g, gate_f), norm_s = b.norms(g, gate_s);
      const T* g_bar = b.g_bar(g, schedule.rank_of_row(row));
      const T *x_f = x_hat(gate_f, g, row), *x_s = x_hat(gate_s, g, row);
      T *f_bar = b.f_bar(g, row), *f_tilde = b.f_tilde(g, row), *s = b.da_s(g, row);
      for (int64_t j = 0; j < H; j += lanes<T>) {
        const Vector<T> y = norm_s(x_s, j), f = tanh(norm_f(x_f, j));
        store(f_bar + j, f);
        if (p.mix == Mix::concat) {
          store(f_tilde + j, y);
        } else {
          const Vector<T> gate = sigmoid(y);
          store(s + j, gate);
          store(f_tilde + j, interpolate(gate, f, load(g_bar + j)));
        }
      }
    }
  }

  void recurrence(Member& member, const Slice* slices, int64_t count) const {
    const int64_t H = p.hidden;

    // Adds up dL/dh_t from step t + 1, and df_tilde of that step, once its du is there.
    const auto finish_step = [&](int64_t t, int64_t g, int64_t rank) {
      const T *dv = b.dv(g, rank), *du = b.du(g, rank), *r = b.r(g, rank);
      T *dh = b.dh(g, rank), *df = b.df(g, schedule.first_row[t] + rank);
      for (int64_t j = 0; j < H; j += lanes<T>) {
        const Vector<T> through_u = load(du + j), through_v = load(dv + j);
        store(df + j, through_v + through_u);
        store(dh + j, load(dh + j) + through_v * load(r + j) + through_u);
      }
    };
    const auto product = [&](const Table<T>& da, Gate gate, const Panels<T>& weight,
                             const Table<T>& target, int64_t t, bool accumulate) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t g = slices[i].group, begin = slices[i].begin;
        gemm<T>(
            member, [&](int64_t m) { return da(g, schedule.first_row[t] + begin + m); }, 1,
            slices[i].active(schedule, t), operand(g, Half(p, g, gate), recurrent_rows(), weight),
            H, H, [&](int64_t m) { return target(g, begin + m); }, accumulate);
      }
    };

    for (int64_t t = p.steps - 1; t >= 0; t--) {
      each_active(member, slices, count, schedule, t, [&](int64_t g, int64_t rank) {
        const int64_t row = schedule.first_row[t] + rank;
        const bool is_last = rank >= schedule.active(t + 1);
        if (!is_last) finish_step(t + 1, g, rank);
        const T* d_out = grad_output(g, t, rank);
        const T* d_last = grad_h_n(g, schedule.sample[rank]);
        const T *x_z = x_hat(gate_z, g, row), *x_h = x_hat(gate_h, g, row);
        const T *x_r = x_hat(gate_r, g, row), *h = h_before(g, t, rank);
        const Norm<T> norm_r = b.norms(g, gate_r), norm_z = b.norms(g, gate_z),
                      norm_h = b.norms(g, gate_h);
        T *dh = b.dh(g, rank), *r = b.r(g, rank), *dy_z = b.da_z(g, row), *dy_h = b.da_h(g, row);
        for (int64_t j = 0; j < H; j += lanes<T>) {
          const Vector<T> z = sigmoid(norm_z(x_z, j)), h_tilde = tanh(norm_h(x_h, j));
          Vector<T> d = load(dh + j);
          if (d_out) d += load(d_out + j, H - j);
          if (is_last && d_last) d += load(d_last + j, H - j);
          store(dy_z + j, sigmoid_backward<Vector<T>>(d * (h_tilde - load(h + j)), z));
          store(dy_h + j, tanh_backward<Vector<T>>(d * z, h_tilde));
          store(r + j, sigmoid(norm_r(x_r, j)));
          store(dh + j, d - d * z);
        }
        through_norm(gate_z, dy_z, g, row, rank);
        through_norm(gate_h, dy_h, g, row, rank);
      });
      member.barrier();
      product(b.da_h, gate_h, b.weight_h, b.dv, t, false);
      member.barrier();
      each_active(member, slices, count, schedule, t, [&](int64_t g, int64_t rank) {
        const int64_t row = schedule.first_row[t] + rank;
        const T *dv = b.dv(g, rank), *h = h_before(g, t, rank), *r = b.r(g, rank);
        T* dy_r = b.da_r(g, row);
        for (int64_t j = 0; j < H; j += lanes<T>)
          store(dy_r + j, sigmoid_backward<Vector<T>>(load(dv + j) * load(h + j), load(r + j)));
        through_norm(gate_r, dy_r, g, row, rank);
      });
      member.barrier();
      product(b.da_r, gate_r, b.weight_r, b.du, t, false);
      product(b.da_z, gate_z, b.weight_z, b.du, t, true);
      member.barrier();
    }
    each_active(member, slices, count, schedule, 0, [&](int64_t g, int64_t rank) {
      finish_step(0, g, rank);
      if (!grad_hx) return;
      T* d_hx = grad_hx + (g * p.batch + schedule.sample[rank]) * H;
      for (int64_t j = 0; j < H; j += lanes<T>) store(d_hx + j, load(b.dh(g, rank) + j), H - j);
    });
  }

  // Computes df_bar, dg_bar and da_s from df_tilde; ends with a barrier.
  void unmix(Member& member) const {
    const int64_t H = p.hidden;
    const int64_t states = p.groups * p.batch, rows = schedule.rows();

    for (int64_t g = 0; g < p.groups; g++) {
      pack(member, g, Half(p, g, gate_s), rows, b.weight_sf);
      pack(member, g, Half(p, g, gate_s, true), p.batch, b.weight_sg);
    }
    for (int64_t i = member.begin(states); i < member.end(states); i++) {
      const int64_t g = i / p.batch, rank = i % p.batch;
      T *dg = b.dg(g, rank), *sum = b.da_s_sum(g, rank);
      const T* g_bar = b.g_bar(g, rank);
      for (int64_t t = 0; t < schedule.length[rank]; t++) {
        const int64_t row = schedule.first_row[t] + rank;
        const T* f_bar = b.f_bar(g, row);
        T *df = b.df(g, row), *dy_s = b.da_s(g, row);
        for (int64_t j = 0; j < H; j += lanes<T>) {
          const Vector<T> d = load(df + j);
          if (p.mix == Mix::concat) {
            store(dy_s + j, d);
            store(df + j, Vector<T>{});
          } else {
            const Vector<T> s = load(dy_s + j), f_minus_g = load(f_bar + j) - load(g_bar + j);
            store(dy_s + j, sigmoid_backward<Vector<T>>(d * f_minus_g, s));
            store(df + j, d * s);
            store(dg + j, load(dg + j) + (d - d * s));
          }
        }
        through_norm(gate_s, dy_s, g, row, rank);
        for (int64_t j = 0; j < H; j += lanes<T>) store(sum + j, load(sum + j) + load(dy_s + j));
      }
    }
    member.barrier();
    for (int64_t g = 0; g < p.groups; g++) {
      gemm<T>(
          member, [&](int64_t row) { return b.da_s(g, row); }, 1, rows,
          operand(g, Half(p, g, gate_s), rows, b.weight_sf), H, H,
          [&](int64_t row) { return b.df(g, row); }, true);
      gemm<T>(
          member, [&](int64_t rank) { return b.da_s_sum(g, rank); }, 1, p.batch,
          operand(g, Half(p, g, gate_s, true), p.batch, b.weight_sg), H, H,
          [&](int64_t rank) { return b.dg(g, rank); }, true);
    }
    member.barrier();
  }

  // Computes da_f, da_g and the gradients of input and context; df_tilde is df_bar without context.
  void mix(Member& member) const {
    const int64_t H = p.hidden;
    const int64_t states = p.groups * p.batch, rows = schedule.rows();

    for (int64_t g = 0; g < p.groups; g++) {
      if (gradient[g].input) pack(member, g, Half(p, g, gate_f), rows, b.weight_f);
      if (gradient[g].context) pack(member, g, Half(p, g, gate_g), p.batch, b.weight_g);
    }
    if (p.has_context) unmix(member);
    for (int64_t i = member.begin(states); i < member.end(states); i++) {
      const int64_t g = i / p.batch, rank = i % p.batch;
      const auto project = [&](Gate gate, const T* bar, T* d, int64_t row) {
        for (int64_t j = 0; j < H; j += lanes<T>)
          store(d + j, tanh_backward<Vector<T>>(load(d + j), load(bar + j)));
        through_norm(gate, d, g, row, rank);
      };
      for (int64_t t = 0; t < schedule.length[rank]; t++) {
        const int64_t row = schedule.first_row[t] + rank;
        project(gate_f, b.f_bar(g, row), b.df(g, row), row);
      }
      if (p.has_context) project(gate_g, b.g_bar(g, rank), b.dg(g, rank), rank);
    }
    member.barrier();
    for (int64_t g = 0; g < p.groups; g++) {
      const Group& group = p.group[g];
      const int64_t D = group.input_size, C = group.context_size;
      if (T* d_input = static_cast<T*>(gradient[g].input)) {
        gemm<T>(
            member, [&](int64_t row) { return b.df(g, row); }, 1, rows,
            operand(g, Half(p, g, gate_f), rows, b.weight_f), D, H,
            [&](int64_t row) {
              const int64_t rank = schedule.rank_of_row(row);
              const int64_t step = schedule.step(schedule.step_of_row[row], rank, group.reverse);
              return d_input + (step * p.batch + schedule.sample[rank]) * D;
            });
        for (int64_t rank = member.begin(p.batch); rank < member.end(p.batch); rank++)
          for (int64_t t = schedule.length[rank]; t < p.steps; t++)
            std::fill_n(d_input + (t * p.batch + schedule.sample[rank]) * D, D, T(0));
      }
      if (T* d_context = static_cast<T*>(gradient[g].context))
        gemm<T>(
            member, [&](int64_t rank) { return b.dg(g, rank); }, 1, p.batch,
            operand(g, Half(p, g, gate_g), p.batch, b.weight_g), C, H,
            [&](int64_t rank) { return d_context + schedule.sample[rank] * C; });
    }
  }

  void weights(Member& member) const {
    const int64_t H = p.hidden;
    const int64_t rows = schedule.rows();
    for (int64_t g = 0; g < p.groups; g++) {
      const Group& group = p.group[g];
      const GroupGradient& grad = gradient[g];
      const auto h_row = [&](int64_t row) {
        return h_before(g, schedule.step_of_row[row], schedule.rank_of_row(row));
      };
      const auto u = [&](int64_t row) {
        return [h = h_row(row), f = b.f_tilde(g, row)](int64_t j) {
          return load(f + j) + load(h + j);
        };
      };
      const auto v = [&](int64_t row) {
        return [h = h_row(row), f = b.f_tilde(g, row), x_hat = x_hat(gate_r, g, row),
                norm = b.norms(g, gate_r)](int64_t j) {
          return sigmoid(norm(x_hat, j)) * load(h + j) + load(f + j);
        };
      };
      const auto input = [&](int64_t row) {
        return [x = input_row<T>(group, schedule, row), D = group.input_size](int64_t j) {
          return load(x + j, D - j);
        };
      };
      const auto context = [&](int64_t rank) {
        return [x = static_cast<const T*>(group.context) +
                    schedule.sample[rank] * group.context_stride_sample,
                C = group.context_size](int64_t j) { return load(x + j, C - j); };
      };
      const auto pack_each = [&](auto x, int64_t columns) {
        return [&, x, columns](int64_t first, int64_t count) {
          member.barrier();
          pack_rows<T>(member, [&](int64_t m) { return x(first + m); }, count, columns, b.right);
          member.barrier();
          return packed(b.right, count);
        };
      };
      const auto of_table = [&](const Table<T>& x) {
        return [&](int64_t first, int64_t) { return in_place(x(g, first), x.width); };
      };
      const auto of = [&](Gate gate, const Table<T>& da, int64_t first, int64_t stride) {
        return WeightGradient<T>{da, static_cast<T*>(grad.weight[gate]) + first, stride};
      };
      const int64_t D = group.input_size, C = group.context_size;
      const auto r = of(gate_r, b.da_r, 0, H), z = of(gate_z, b.da_z, 0, H);
      weight_gradients<T>(member, {r, z}, g, pack_each(u, H), rows, H, H);
      weight_gradients<T>(member, {of(gate_h, b.da_h, 0, H)}, g, pack_each(v, H), rows, H, H);
      weight_gradients<T>(member, {of(gate_f, b.df, 0, D)}, g, pack_each(input, D), rows, H, D);
      if (p.has_context) {
        weight_gradients<T>(member, {of(gate_s, b.da_s, 0, 2 * H)}, g, of_table(b.f_bar), rows, H,
                            H);
        weight_gradients<T>(member, {of(gate_s, b.da_s_sum, H, 2 * H)}, g, of_table(b.g_bar),
                            p.batch, H, H);
        weight_gradients<T>(member, {of(gate_g, b.dg, 0, C)}, g, pack_each(context, C), p.batch, H,
                            C);
      }
      if (!b.norms.enabled) continue;
      const int64_t norms = norm_rows(p.has_context) * 2;
      for (int64_t i = member.begin(norms); i < member.end(norms); i++) {
        T* target = static_cast<T*>(i % 2 ? grad.norm_bias : grad.norm_weight) + i / 2 * H;
        for (int64_t j = 0; j < H; j += lanes<T>) {
          Vector<T> total{};
          for (int64_t rank = 0; rank < p.batch; rank++)
            total += load(b.norm_gradient(g, rank, i / 2, int(i % 2)) + j);
          store(target + j, total, H - j);
        }
      }
    }
  }
};

}  // namespace mmixer::cpu::MMIXER_ISA
