// The messages that the blocks of a team send each other, over one of two ways. Both have the same
// channels: a channel carries, once per step, rows of an operand or partial sums of statistics, or
// both, from every block to every block (the sender too), and lands in shared memory.
//
// Only the messages themselves tell a sender that what it overwrites has been read: who reads a
// message sends another one afterwards, and the message is overwritten only when all of those have
// come. So a warp reads before it sends; one that has nothing to send reads before a barrier of its
// block, and another warp sends behind that.
#pragma once

#include "team.h"

namespace mmixer::cuda {

// A channel carries rows of consecutive operands of the landing, one operand after another, and
// partial sums of consecutive statistics.
struct Channel {
  int first_operand = 0, operands = 0, first_statistic = 0, statistics = 0;

  constexpr Channel with_operands(int first, int count) const {
    return {first, count, first_statistic, statistics};
  }
  constexpr Channel with_statistics(int first, int count) const {
    return {first_operand, operands, first, count};
  }
};

template <class L, int operands, int statistics>
struct Landing {
  alignas(16) uint16_t operand[operands][L::terms][L::samples][L::stride];
  alignas(16) uint16_t stage[operands][L::terms][L::elements];
  alignas(16) float statistic[statistics][L::samples][L::sums];

  MMIXER_DEVICE SharedOperand<L> source(int which) const { return {&operand[which][0][0][0]}; }

  // Stages the terms of a thread's element, for its warp to send.
  MMIXER_DEVICE void put(int which, float x) {
    uint16_t terms[L::terms];
    split<L>(x, terms);
    MMIXER_UNROLL
    for (int i = 0; i < L::terms; i++) stage[which][i][thread_index()] = terms[i];
    warp_sync();
  }

  MMIXER_DEVICE float total(int which, int sample) const {
    Word4 four[L::sums / 4];
    MMIXER_UNROLL
    for (int i = 0; i < L::sums / 4; i++) four[i] = load4(&statistic[which][sample][4 * i]);
    return pairwise_sum<0, L::sums>([&](int i) { return as_float(four[i / 4].word[i % 4]); });
  }
};

// Each x becomes its sum over the `lanes` neighbouring lanes that hold rows of one sample. Several
// sums at once take no longer than one.
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

// The exchange in thread block clusters (Hopper and newer): every block stores into the shared
// memory of every other; an mbarrier per channel counts the bytes that arrived. A block receives
// all that is sent to it, so that none is gone when a store arrives, and no wait is needed in the
// end.
template <class L, class Landing, class Schedule>
class ClusterExchange {
 public:
  struct Shared {
    Mbarrier barrier[Schedule::channels];
  };
  static constexpr bool is_cluster = true, receive_is_barrier = false;
  using Packet = uint64_t;  // none
  static constexpr int packets = 0;

  static MMIXER_CONSTANT int bytes(int channel) {
    return Schedule::channel[channel].operands * L::terms * L::samples * L::H * 2 +
           Schedule::channel[channel].statistics * L::samples * L::sums * 4;
  }

  MMIXER_DEVICE ClusterExchange(Shared& shared, Landing& landing, void*, int rank)
      : shared_(shared), landing_(landing), rank_(rank) {
    static_assert(L::C <= L::lanes, "a lane per peer sends a sum");
    if (thread_index() == 0) {
      for (int channel = 0; channel < Schedule::channels; channel++)
        mbarrier_init(&shared.barrier[channel], 1);
      mbarrier_init_fence();
      expect<Schedule::channels - 1>();
    }
    cluster_sync();
  }

  // Sends the sums of x as the statistics first, first + 1, ...: some or all of the channel's.
  template <int channel, int first, int count>
  MMIXER_DEVICE void send_statistics(const Element<L>& own, float (&&x)[count], int) {
    sum_lanes<L>(x);
    const int peer = thread_index() % L::lanes;
    const int sum = rank_ * (L::rows / L::lanes) + own.row / L::lanes;
    if (peer < L::C) MMIXER_UNROLL
    for (int i = 0; i < count; i++)
      store_async(&landing_.statistic[first + i][own.sample][sum], peer, x[i],
                  &shared_.barrier[channel]);
  }

  template <int channel, int which>
  MMIXER_DEVICE void send_operand(float x, int) {
    constexpr int chunks = 4 * L::terms;  // per warp and peer, each of 8 rows: 16 bytes
    constexpr int all = chunks * L::C, count = (all + 31) / 32;  // chunks per warp, and per lane
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    landing_.put(which, x);
    Word4 rows[count];
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      const int chunk = (i * 32 + lane) % chunks;
      rows[i] = load4(&landing_.stage[which][chunk / 4][warp * 32 + chunk % 4 * 8]);
    }
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      const int chunk = (i * 32 + lane) % chunks, peer = (i * 32 + lane) / chunks;
      const int element = warp * 32 + chunk % 4 * 8;
      uint16_t* const target =
          &landing_
               .operand[which][chunk / 4][element / L::rows][rank_ * L::rows + element % L::rows];
      if (all % 32 == 0 || peer < L::C)
        store_async(reinterpret_cast<Word4*>(target), peer, rows[i], &shared_.barrier[channel]);
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

// The exchange through the L2 cache (Ampere, Ada; sizes that no cluster holds): packets of one or
// three words of data beside the number of the step, so that what is read tells by itself whether
// it is new. All blocks must be resident. A packet lands where its own number and the thread's say,
// mostly at compile time.
template <class L, class Landing, class Schedule, class Packet_>
class GlobalExchange {
 public:
  using Packet = Packet_;
  struct Shared {};
  static constexpr bool is_cluster = false, receive_is_barrier = true;
  static constexpr int words = sizeof(Packet) / sizeof(uint32_t) - 1;  // of data per packet
  static constexpr int row_words = L::H / 2;                           // per sample's operand
  // A packet of three words has rows of one warp, whose last packet is not full.
  static constexpr int warp_packets = (16 * L::terms + words - 1) / words;
  static constexpr int warps = L::elements / 32;  // the senders
  static constexpr int operand_packets = L::C * warps * warp_packets;
  static constexpr int statistic_packets = L::samples * L::sums;

  static MMIXER_CONSTANT int channel_packets(int channel) {
    return Schedule::channel[channel].operands * operand_packets +
           Schedule::channel[channel].statistics * statistic_packets;
  }
  static MMIXER_CONSTANT int offset(int channel) {
    return channel == 0 ? 0 : offset(channel - 1) + channel_packets(channel - 1);
  }
  // The number of packets per team, which must be zero at the start.
  static constexpr int packets = offset(Schedule::channels);

  MMIXER_DEVICE GlobalExchange(Shared&, Landing& landing, void* packets, int rank)
      : landing_(landing), packets_(static_cast<Packet*>(packets)), rank_(rank) {
    static_assert(words == 1 || (L::rows % 32 == 0 && L::terms == 1), "a packet is of one sample");
    block_sync();
  }

  template <int channel, int first, int count>
  MMIXER_DEVICE void send_statistics(const Element<L>& own, float (&&x)[count], int step) {
    sum_lanes<L>(x);
    constexpr Channel c = Schedule::channel[channel];
    Packet* const target = packets_ + offset(channel) + c.operands * operand_packets +
                           ((first - c.first_statistic) * L::samples + own.sample) * L::sums +
                           rank_ * (L::rows / L::lanes) + own.row / L::lanes;
    if (thread_index() % L::lanes == 0) MMIXER_UNROLL
    for (int i = 0; i < count; i++) send_alone(target + i * statistic_packets, as_bits(x[i]), step);
  }

  template <int channel, int which>
  MMIXER_DEVICE void send_operand(float x, int step) {
    constexpr int start =
        offset(channel) + (which - Schedule::channel[channel].first_operand) * operand_packets;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    landing_.put(which, x);
    MMIXER_UNROLL
    for (int i = lane; i < warp_packets; i += 32) {
      const int term = words == 1 ? i / 16 : 0;
      const int element = warp * 32 + i * words % 16 * 2;  // the first of the packet
      const int operand_row = term * L::samples + element / L::rows;
      const int number = words == 1
                             ? operand_row * row_words + (rank_ * L::rows + element % L::rows) / 2
                             : (rank_ * warps + warp) * warp_packets + i;
      uint32_t data[words];
      MMIXER_UNROLL
      for (int j = 0; j < words; j++) {
        const int further = words == 1 || i * words + j < 16 ? 2 * j : 0;
        memcpy(&data[j], &landing_.stage[which][term][element + further], sizeof data[j]);
      }
      send(packets_ + start + number, data, step);
    }
  }

  template <int channel>
  MMIXER_DEVICE void receive(int step) {
    constexpr Channel c = Schedule::channel[channel];
    constexpr int count = channel_packets(channel);
    constexpr int most = (count + L::threads - 1) / L::threads;  // loads per thread
    constexpr int rounds = (most + 11) / 12;
    constexpr int at_once = (most + rounds - 1) / rounds;  // loads in flight
    constexpr bool is_even = count % (at_once * L::threads) == 0;
    const int thread = thread_index();
    const Packet* const source = packets_ + offset(channel) + thread;
    MMIXER_UNROLL
    for (int first = 0; first < count; first += at_once * L::threads) {
      // A packet that is to come has another tag, and one that lies beyond the last has this tag.
      Packet packet[at_once];
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++) {
        const bool exists = is_even || first + i * L::threads + thread < count;
        set_tag(packet[i], exists ? ~(step + 1) : step + 1);
      }
      // Each round asks at once for all packets that have not come.
      for (bool waits = true; waits;) {
        waits = false;
        MMIXER_UNROLL
        for (int i = 0; i < at_once; i++) {
          const int number = first + i * L::threads;  // thread 0's packet
          if (number >= count || packet_ready(packet[i], step + 1)) continue;
          packet[i] = load_packet(source + number);
          waits = true;
        }
      }
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++) {
        const int number = first + i * L::threads;
        if (is_even || number + thread < count) land(c, number, thread, packet[i]);
      }
    }
    block_sync();
  }

 private:
  MMIXER_DEVICE static void send(Packet* target, const uint32_t (&data)[words], int step) {
    if constexpr (words == 1)
      store_packet(target, data[0], step + 1);
    else
      store_packet(target, data, step + 1);
  }

  // Sends a word in all words of a packet: ptxas splits the load of a packet whose words are not
  // all used into two, and then the tag says nothing of the data.
  MMIXER_DEVICE static void send_alone(Packet* target, uint32_t data, int step) {
    uint32_t copies[words];
    MMIXER_UNROLL
    for (int j = 0; j < words; j++) copies[j] = data;
    send(target, copies, step);
  }

  MMIXER_DEVICE static uint32_t alone(const Packet& packet) {
    uint32_t data = word_of(packet, 0);
    MMIXER_UNROLL
    for (int j = 1; j < words; j++) data &= word_of(packet, j);
    return data;
  }

  // Lands the channel's packet `number` + thread.
  MMIXER_DEVICE void land(const Channel& c, int number, int thread, const Packet& packet) {
    MMIXER_UNROLL
    for (int i = 0; i < c.operands; i++, number -= operand_packets)
      if (number + L::threads <= operand_packets ||
          (number < operand_packets && number + thread < operand_packets))
        return land_operand(c.first_operand + i, number, thread, packet);
    (&landing_.statistic[c.first_statistic][0][0])[number + thread] = as_float(alone(packet));
  }

  MMIXER_DEVICE void land_operand(int which, int number, int thread, const Packet& packet) {
    if constexpr (words == 1) {
      // Quotient and remainder of the sum are those of the summands, where one divides the other.
      constexpr bool apart = L::threads % row_words == 0 || row_words % L::threads == 0;
      const int all = number + thread;
      const int operand_row = apart ? number / row_words + thread / row_words : all / row_words;
      const int word = apart ? number % row_words + thread % row_words : all % row_words;
      const uint32_t data = word_of(packet, 0);
      memcpy(&(&landing_.operand[which][0][0][0])[operand_row * L::stride + 2 * word], &data,
             sizeof data);
    } else {
      const int warp = (number + thread) / warp_packets, i = (number + thread) % warp_packets;
      const int element = warp % warps * 32 + i * words * 2;
      uint16_t* const target =
          &landing_
               .operand[which][0][element / L::rows][warp / warps * L::rows + element % L::rows];
      MMIXER_UNROLL
      for (int j = 0; j < words; j++) {
        const uint32_t data = word_of(packet, j);
        if (j == 0 || i * words + j < 16) memcpy(target + 2 * j, &data, sizeof data);
      }
    }
  }

  Landing& landing_;
  Packet* const packets_;
  const int rank_;
};

// The ways in which a team exchanges, as parameters of its kernels.
struct ClusterPath {
  template <class L, class Landing, class Schedule>
  using Exchange = ClusterExchange<L, Landing, Schedule>;
};

struct CooperativePath {
  template <class L, class Landing, class Schedule>
  using Exchange = GlobalExchange<L, Landing, Schedule, uint64_t>;
};

struct WidePath {
  template <class L, class Landing, class Schedule>
  using Exchange = GlobalExchange<L, Landing, Schedule, Word4>;
};

}  // namespace mmixer::cuda
