// Which tiles the kernels of csrc/cpu are compiled for, and which of them have run. The tests'
// build includes this before csrc/cpu/instruction_set.cpp, once per instruction set.
//
// A tile is known as soon as its function is instantiated, so that no list of shapes can miss one,
// and one that cannot occur is found too: it never runs.
#pragma once

#include <atomic>

namespace mmixer::tests {

struct Tile {
  const char *set, *kernel;
  int bits, rows, columns;  // bits of an element
  std::atomic<bool> ran{false};
  const Tile* next = nullptr;

  constexpr Tile(const char* set, const char* kernel, int bits, int rows, int columns)
      : set(set), kernel(kernel), bits(bits), rows(rows), columns(columns) {}
};

// Puts a tile before the others that are known, before main and on every processor: what calls it
// is compiled for one set, and is so little that it has no vectors.
bool know(Tile& tile);

// The tile that became known last; its `next` leads to the others.
const Tile* first_tile();

template <class Shape>
struct TileOf {
  static inline Tile tile = Shape::tile();
  static inline const bool known = know(tile);

  static void run() { tile.ran.store(known, std::memory_order_relaxed); }
};

}  // namespace mmixer::tests

#define MMIXER_TEXT_OF(name) #name
#define MMIXER_TEXT(name) MMIXER_TEXT_OF(name)
#define MMIXER_TILE(kernel, type, rows, columns)                                                \
  struct ThisTile {                                                                             \
    static constexpr tests::Tile tile() {                                                       \
      return {MMIXER_TEXT(MMIXER_ISA), kernel, 8 * int(sizeof(type)), int(rows), int(columns)}; \
    }                                                                                           \
  };                                                                                            \
  tests::TileOf<ThisTile>::run()
