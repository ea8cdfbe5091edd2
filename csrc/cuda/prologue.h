// Equations 7-10 and their gradients, between the products with W_f, W_g and W_s.
#pragma once

#include "rows.h"

namespace mmixer::cuda {

// y = tanh(LN(a)): Eq. 7, Eq. 8.
template <class T>
struct NormTanh {
  using Arguments = NormTanhArguments;
  using Shared = typename BlockSum<T, 1>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& arguments) {
    const int G = arguments.G, rows = arguments.rows, H = arguments.H, blocks = arguments.blocks;
    const int group = block_index() / blocks;
    BlockSum<T, 1> sum(*static_cast<Shared*>(memory));
    const Affine<T> affine(static_cast<const T*>(arguments.norms), G, group, arguments.gate, H);
    for (int line = block_index() % blocks; line < rows; line += blocks) {
      const int64_t place = (int64_t(group) * rows + line) * H;
      const T* a = static_cast<const T*>(arguments.a) + place;
      const auto s = statistics<T>([&](int i) { return load(a + i); }, H, T(arguments.eps),
                                   affine.weight, sum);
      for (int i = thread_index(); i < H; i += threads)
        store_as<T>(arguments.y, arguments.y_dtype, place + i,
                    Activation<false>::tanh(affine(i, (load(a + i) - s.mean) * s.r_std)));
    }
  }
};

template <class T>
struct NormTanhBackward {
  using Arguments = NormTanhBackwardArguments;
  struct Shared {
    typename BlockSum<T, 1>::Shared one;
    typename BlockSum<T, 2>::Shared two;
  };
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& arguments) {
    const int G = arguments.G, rows = arguments.rows, H = arguments.H, blocks = arguments.blocks;
    const int group = block_index() / blocks;
    Shared& shared = *static_cast<Shared*>(memory);
    BlockSum<T, 1> sum(shared.one);
    BlockSum<T, 2> sums(shared.two);
    const Affine<T> affine(static_cast<const T*>(arguments.norms), G, group, arguments.gate, H);
    T* grad_norm = static_cast<T*>(arguments.grad_norm) + int64_t(block_index()) * 2 * H;
    for (int line = block_index() % blocks; line < rows; line += blocks) {
      const int64_t place = (int64_t(group) * rows + line) * H;
      const T* a = static_cast<const T*>(arguments.a) + place;
      const T* first = static_cast<const T*>(arguments.grad_y) + place;
      const T* second = static_cast<const T*>(arguments.grad_y_more);
      if (second) second += place;
      const auto s = statistics<T>([&](int i) { return load(a + i); }, H, T(arguments.eps),
                                   affine.weight, sum);
      const auto x_hat = [&](int i) { return (load(a + i) - s.mean) * s.r_std; };
      const auto dy = [&](int i) {
        const T grad = load(first + i) + (second ? load(second + i) : T(0));
        return tanh_backward(grad, Activation<false>::tanh(affine(i, x_hat(i))));
      };
      norm_gradient(x_hat, dy, s.r_std, affine, H, grad_norm, grad_norm + H, line < blocks, sums,
                    [&](int i, T x) {
                      store_as(arguments.grad_a, arguments.grad_a_dtype, place + i, x);
                    });
    }
  }
};

// s = sigmoid(LN(a + context)), f_tilde = s f_bar + (1 - s) g_bar: Eq. 9, 10. concat: LN(a + context).
template <class T>
struct Mix {
  using Arguments = MixArguments;
  using Shared = typename BlockSum<T, 1>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& arguments) {
    const int G = arguments.G, rows = arguments.rows, H = arguments.H, blocks = arguments.blocks;
    const int group = block_index() / blocks;
    BlockSum<T, 1> sum(*static_cast<Shared*>(memory));
    const Affine<T> affine(static_cast<const T*>(arguments.norms), G, group, norm_s, H);
    for (int line = block_index() % blocks; line < rows; line += blocks) {
      const int64_t place = (int64_t(group) * rows + line) * H;
      const int64_t sample = (int64_t(group) * arguments.samples + line % arguments.samples) * H;
      const T* a = static_cast<const T*>(arguments.a) + place;
      const T* context = static_cast<const T*>(arguments.context) + sample;
      const auto row = [&](int i) { return load(a + i) + load(context + i); };
      const auto s = statistics<T>(row, H, T(arguments.eps), affine.weight, sum);
      for (int i = thread_index(); i < H; i += threads) {
        T y = affine(i, (row(i) - s.mean) * s.r_std);
        if (!arguments.concat)
          y = interpolate(Activation<false>::sigmoid(y),
                          load_as<T>(arguments.f_bar, arguments.dtype, place + i),
                          load_as<T>(arguments.g_bar, arguments.dtype, sample + i));
        store_as(arguments.f_tilde, arguments.dtype, place + i, y);
      }
    }
  }
};

template <class T>
struct MixBackward {
  using Arguments = MixArguments;
  struct Shared {
    typename BlockSum<T, 1>::Shared one;
    typename BlockSum<T, 2>::Shared two;
  };
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& arguments) {
    const int G = arguments.G, rows = arguments.rows, H = arguments.H, blocks = arguments.blocks;
    const int group = block_index() / blocks;
    Shared& shared = *static_cast<Shared*>(memory);
    BlockSum<T, 1> sum(shared.one);
    BlockSum<T, 2> sums(shared.two);
    const Affine<T> affine(static_cast<const T*>(arguments.norms), G, group, norm_s, H);
    T* grad_norm = static_cast<T*>(arguments.grad_norm) + int64_t(block_index()) * 2 * H;
    for (int line = block_index() % blocks; line < rows; line += blocks) {
      const int64_t place = (int64_t(group) * rows + line) * H;
      const int64_t sample = (int64_t(group) * arguments.samples + line % arguments.samples) * H;
      const T* a = static_cast<const T*>(arguments.a) + place;
      const T* context = static_cast<const T*>(arguments.context) + sample;
      const T* grad = static_cast<const T*>(arguments.grad_f_tilde) + place;
      const auto row = [&](int i) { return load(a + i) + load(context + i); };
      const auto s = statistics<T>(row, H, T(arguments.eps), affine.weight, sum);
      const auto x_hat = [&](int i) { return (row(i) - s.mean) * s.r_std; };
      const auto gate = [&](int i) { return Activation<false>::sigmoid(affine(i, x_hat(i))); };
      const auto dy = [&](int i) {
        if (arguments.concat) return load(grad + i);
        const T f_bar = load_as<T>(arguments.f_bar, arguments.dtype, place + i);
        const T g_bar = load_as<T>(arguments.g_bar, arguments.dtype, sample + i);
        return sigmoid_backward(load(grad + i) * (f_bar - g_bar), gate(i));
      };
      norm_gradient(x_hat, dy, s.r_std, affine, H, grad_norm, grad_norm + H, line < blocks, sums,
                    [&](int i, T x) { store_as(arguments.grad_a, arguments.dtype, place + i, x); });
      if (arguments.concat) continue;
      for (int i = thread_index(); i < H; i += threads) {
        const T d = load(grad + i), to_f = d * gate(i);
        static_cast<T*>(arguments.grad_f_bar)[place + i] = to_f;
        static_cast<T*>(arguments.grad_g_bar)[place + i] = d - to_f;
      }
    }
  }
};

}  // namespace mmixer::cuda
