// What the blocks of a team tell each other, over one of two ways. Both have the same channels: a
// channel carries, once a step, rows of an operand or partial sums of statistics, or both, from every
// block to every block (the sender too), and lands in shared memory. Channels are used in turn, and a
// block sends on one only after it received on the one before: that alone says that everybody has
// read what it overwrites.
#pragma once

#include "layout.h"

namespace mmixer::cuda {

// What a channel carries: rows of Landing::operand[operand], if not negative, and the statistics
// [first, first + statistics) of Landing::statistic.
struct Channel {
  int operand, first, statistics;
};

template <class L, int operands, int statistics>
struct Landing {
  alignas(16) uint16_t operand[operands][L::parts][L::samples][L::stride];
  alignas(16) uint16_t stage[operands][L::parts][L::elements];
  alignas(16) float statistic[statistics][L::samples][L::sums];

  MMIXER_DEVICE SharedOperand<L> source(int which) const { return {&operand[which][0][0][0]}; }

  MMIXER_DEVICE float total(int which, int sample) const {
    float sum = 0;
    MMIXER_UNROLL
    for (int i = 0; i < L::sums; i += 4) {
      const Word4 four = load4(&statistic[which][sample][i]);
      sum += (as_float(four.word[0]) + as_float(four.word[1])) +
             (as_float(four.word[2]) + as_float(four.word[3]));
    }
    return sum;
  }
};

// The sum over this block's rows of a sample, `lanes` at a time, as far as a warp knows it.
template <class L>
MMIXER_DEVICE float sum_lanes(float x) {
  MMIXER_UNROLL
  for (int mask = L::lanes / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Thread block clusters (Hopper and newer): every block stores into the shared memory of every other;
// an mbarrier a channel counts the bytes that arrived. A block receives all that is sent to it, so that
// none is gone when a store arrives: there is nothing to wait for in the end.
template <class L, class Landing, class Schedule>
class ClusterExchange {
 public:
  struct Shared {
    Mbarrier barrier[Schedule::channels];
  };
  static constexpr bool is_cluster = true;
  static constexpr int packets = 0;

  static MMIXER_CONSTANT int bytes(int channel) {
    return (Schedule::channel[channel].operand < 0 ? 0 : L::parts * L::samples * L::H * 2) +
           Schedule::channel[channel].statistics * L::samples * L::sums * 4;
  }

  MMIXER_DEVICE ClusterExchange(Shared& shared, Landing& landing, uint64_t*, int rank)
      : shared_(shared), landing_(landing), rank_(rank) {
    static_assert(L::C <= L::lanes, "a lane a peer sends a sum");
    if (thread_index() == 0) {
      for (int channel = 0; channel < Schedule::channels; channel++)
        mbarrier_init(&shared.barrier[channel], 1);
      mbarrier_init_fence();
      expect<Schedule::channels - 1>();
    }
    cluster_sync();
  }

  template <int channel>
  MMIXER_DEVICE void send_statistic(int which, const Element<L>& element, float x, int) {
    const float sum = sum_lanes<L>(x);
    const int peer = thread_index() % L::lanes;
    if (peer < L::C)
      store_async(&landing_.statistic[which][element.sample][rank_ * (L::rows / L::lanes) +
                                                             element.row / L::lanes],
                  peer, sum, &shared_.barrier[channel]);
  }

  // Sends the rows that this warp has staged.
  template <int channel>
  MMIXER_DEVICE void send_operand(int) {
    constexpr int which = Schedule::channel[channel].operand;
    constexpr int chunks = 4 * L::per_thread * L::parts;  // of 8 rows: 16 bytes
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    warp_sync();
    MMIXER_UNROLL
    for (int i = lane; i < chunks * L::C; i += 32) {
      const int chunk = i % chunks, peer = i / chunks, part = chunk / (4 * L::per_thread);
      const int element =
          warp * 32 + chunk / 4 % L::per_thread * L::threads + chunk % 4 * 8;
      if (element >= L::elements) continue;
      uint16_t* target = &landing_.operand[which][part][element / L::rows]
                                          [rank_ * L::rows + element % L::rows];
      store_async(reinterpret_cast<Word4*>(target), peer,
                  load4(&landing_.stage[which][part][element]), &shared_.barrier[channel]);
    }
  }

  template <int channel>
  MMIXER_DEVICE void receive(int step) {
    mbarrier_wait(&shared_.barrier[channel], step & 1);
    constexpr int next = bytes(channel);
    if (thread_index() == 0) mbarrier_expect(&shared_.barrier[channel], next);
  }

 private:
  template <int channel>
  MMIXER_DEVICE void expect() {
    constexpr int first = bytes(channel);
    mbarrier_expect(&shared_.barrier[channel], first);
    if constexpr (channel > 0) expect<channel - 1>();
  }

  Shared& shared_;
  Landing& landing_;
  const int rank_;
};

// Through the L2 cache (Ampere, Ada; sizes that no cluster holds): packets of 32 bits beside the number
// of the step, so that what is read tells by itself whether it is new. All blocks must be resident.
template <class L, class Landing, class Schedule>
class GlobalExchange {
 public:
  struct Shared {};
  static constexpr bool is_cluster = false;
  static constexpr int operand_packets = L::parts * L::samples * L::H / 2;
  static constexpr int statistic_packets = L::samples * L::sums;

  static MMIXER_CONSTANT int channel_packets(int channel) {
    return (Schedule::channel[channel].operand < 0 ? 0 : operand_packets) +
           Schedule::channel[channel].statistics * statistic_packets;
  }
  static MMIXER_CONSTANT int offset(int channel) {
    return channel == 0 ? 0 : offset(channel - 1) + channel_packets(channel - 1);
  }
  // 8 bytes each, of a team; they must be zero at the start.
  static constexpr int packets = offset(Schedule::channels);

  MMIXER_DEVICE GlobalExchange(Shared&, Landing& landing, uint64_t* packets, int rank)
      : landing_(landing), packets_(packets), rank_(rank) {
    block_sync();
  }

  template <int channel>
  MMIXER_DEVICE void send_statistic(int which, const Element<L>& element, float x, int step) {
    const float sum = sum_lanes<L>(x);
    constexpr Channel c = Schedule::channel[channel];
    uint64_t* packet = packets_ + offset(channel) + (c.operand < 0 ? 0 : operand_packets) +
                       ((which - c.first) * L::samples + element.sample) * L::sums +
                       rank_ * (L::rows / L::lanes) + element.row / L::lanes;
    if (thread_index() % L::lanes == 0) store_packet(packet, as_bits(sum), step + 1);
  }

  template <int channel>
  MMIXER_DEVICE void send_operand(int step) {
    constexpr int which = Schedule::channel[channel].operand;
    constexpr int pairs = 16 * L::per_thread * L::parts;  // of rows
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    warp_sync();
    MMIXER_UNROLL
    for (int i = lane; i < pairs; i += 32) {
      const int part = i / (16 * L::per_thread);
      const int element = warp * 32 + i / 16 % L::per_thread * L::threads + i % 16 * 2;
      if (element >= L::elements) continue;
      const uint16_t* stage = &landing_.stage[which][part][element];
      const int sample = part * L::samples + element / L::rows;
      store_packet(packets_ + offset(channel) +
                       (sample * L::H + rank_ * L::rows + element % L::rows) / 2,
                   uint32_t(stage[1]) << 16 | stage[0], step + 1);
    }
  }

  template <int channel>
  MMIXER_DEVICE void receive(int step) {
    constexpr Channel c = Schedule::channel[channel];
    constexpr int at_once = 8;  // loads in flight
    constexpr int count = channel_packets(channel);
    const uint64_t* const source = packets_ + offset(channel);
    for (int first = thread_index(); first < count; first += at_once * L::threads) {
      uint64_t packet[at_once];
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++)
        if (first + i * L::threads < count) packet[i] = load_packet(source + first + i * L::threads);
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++) {
        const int index = first + i * L::threads;
        if (index >= count) break;
        while (!packet_ready(packet[i], step + 1)) packet[i] = load_packet(source + index);
        land(c, index, uint32_t(packet[i]));
      }
    }
    block_sync();
  }

 private:
  MMIXER_DEVICE void land(const Channel& c, int index, uint32_t data) {
    if (c.operand >= 0) {
      if (index < operand_packets) {
        const int sample = index * 2 / L::H, row = index * 2 % L::H;
        memcpy(&landing_.operand[c.operand][sample / L::samples][sample % L::samples][row], &data,
               sizeof data);
        return;
      }
      index -= operand_packets;
    }
    (&landing_.statistic[c.first][0][0])[index] = as_float(data);
  }

  Landing& landing_;
  uint64_t* const packets_;
  const int rank_;
};

}  // namespace mmixer::cuda
