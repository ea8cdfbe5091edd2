// What the blocks of a team tell each other, over one of two ways. Both have the same channels: a
// channel carries, once per step, rows of an operand or partial sums of statistics, or both, from every
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

  // The terms of a thread's elements, for its warp to send.
  MMIXER_DEVICE void put(int which, const float (&x)[L::per_thread]) {
    each_element<L>([&](int j, const Element<L>&) {
      uint16_t term[L::parts];
      split<L>(x[j], term);
      MMIXER_UNROLL
      for (int part = 0; part < L::parts; part++)
        stage[which][part][thread_index() + j * L::threads] = term[part];
    });
    warp_sync();
  }

  MMIXER_DEVICE float total(int which, int sample) const {
    Word4 four[L::sums / 4];
    MMIXER_UNROLL
    for (int i = 0; i < L::sums / 4; i++) four[i] = load4(&statistic[which][sample][4 * i]);
    return pairwise_sum<0, L::sums>([&](int i) { return as_float(four[i / 4].word[i % 4]); });
  }
};

// The sums over this block's rows of a sample, `lanes` at a time, as far as a warp knows them. What
// several of them wait for is that of one.
template <class L, int count>
MMIXER_DEVICE void sum_lanes(float (&x)[count]) {
  MMIXER_UNROLL
  for (int mask = L::lanes / 2; mask; mask /= 2) {
    float other[count];
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) other[i] = shuffle_xor(x[i], mask);
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) x[i] += other[i];
  }
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

  // x: what the statistics first, first + 1, ... are sums of. Of a channel's, some or all.
  template <int channel, int first, int count>
  MMIXER_DEVICE void send_statistics(const Element<L>& element, float (&&x)[count], int) {
    sum_lanes<L>(x);
    const int peer = thread_index() % L::lanes;
    const int place = rank_ * (L::rows / L::lanes) + element.row / L::lanes;
    if (peer < L::C)
      MMIXER_UNROLL
      for (int i = 0; i < count; i++)
        store_async(&landing_.statistic[first + i][element.sample][place], peer, x[i],
                    &shared_.barrier[channel]);
  }

  template <int channel>
  MMIXER_DEVICE void send_operand(const float (&x)[L::per_thread], int) {
    constexpr int which = Schedule::channel[channel].operand;
    constexpr int chunks = 4 * L::per_thread * L::parts;  // of 8 rows: 16 bytes
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    landing_.put(which, x);
    constexpr int all = chunks * L::C, count = (all + 31) / 32;  // of a warp and of a lane
    Word4 rows[count];
    int place[count];
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      const int chunk = (i * 32 + lane) % chunks, part = chunk / (4 * L::per_thread);
      place[i] = warp * 32 + chunk / 4 % L::per_thread * L::threads + chunk % 4 * 8;
      if (L::all_exist || place[i] < L::elements)
        rows[i] = load4(&landing_.stage[which][part][place[i]]);
    }
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      const int part = (i * 32 + lane) % chunks / (4 * L::per_thread);
      uint16_t* const target = &landing_.operand[which][part][place[i] / L::rows]
                                                [rank_ * L::rows + place[i] % L::rows];
      if ((L::all_exist || place[i] < L::elements) && (all % 32 == 0 || i * 32 + lane < all))
        store_async(reinterpret_cast<Word4*>(target), (i * 32 + lane) / chunks, rows[i],
                    &shared_.barrier[channel]);
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

  template <int channel, int first, int count>
  MMIXER_DEVICE void send_statistics(const Element<L>& element, float (&&x)[count], int step) {
    sum_lanes<L>(x);
    constexpr Channel c = Schedule::channel[channel];
    uint64_t* const packet = packets_ + offset(channel) + (c.operand < 0 ? 0 : operand_packets) +
                             ((first - c.first) * L::samples + element.sample) * L::sums +
                             rank_ * (L::rows / L::lanes) + element.row / L::lanes;
    if (thread_index() % L::lanes == 0)
      MMIXER_UNROLL
      for (int i = 0; i < count; i++)
        store_packet(packet + i * statistic_packets, as_bits(x[i]), step + 1);
  }

  template <int channel>
  MMIXER_DEVICE void send_operand(const float (&x)[L::per_thread], int step) {
    constexpr int which = Schedule::channel[channel].operand;
    constexpr int pairs = 16 * L::per_thread * L::parts;  // of rows
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    landing_.put(which, x);
    MMIXER_UNROLL
    for (int i = lane; i < pairs; i += 32) {
      const int part = i / (16 * L::per_thread);
      const int element = warp * 32 + i / 16 % L::per_thread * L::threads + i % 16 * 2;
      if (!L::all_exist && element >= L::elements) continue;
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

// The ways of a team, as parameters of its kernels.
struct ClusterPath {
  template <class L, class Landing, class Schedule>
  using Exchange = ClusterExchange<L, Landing, Schedule>;
};

struct CooperativePath {
  template <class L, class Landing, class Schedule>
  using Exchange = GlobalExchange<L, Landing, Schedule>;
};

}  // namespace mmixer::cuda
