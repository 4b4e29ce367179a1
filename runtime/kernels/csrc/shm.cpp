// One exchange between the ranks of a host through a file mapped in memory.
//
// The file holds one line of flags per rank, then two sets of one slot per rank. Exchange number s uses set s % 2:
// a rank writes its slot, publishes s, waits until every rank has published s, and reads all slots in rank order. A
// slot is written again at s + 2, which its owner reaches only after everybody has published s + 1, that is, has
// finished reading s; so one wait per exchange is enough.
#include <ATen/core/Tensor.h>
#include <sched.h>
#include <torch/library.h>

#include <atomic>
#include <bit>
#include <chrono>

#include "simd.h"

namespace quasar {
namespace {

struct alignas(128) Line {
  std::atomic<int64_t> done;     // the last exchange this rank has written
  std::atomic<int64_t> tag[2];   // what it is, by parity: kind and bytes
  std::atomic<int64_t> left;     // set when the rank closes or gives up
  int64_t attached, ready;       // the handshake at the start, runtime/comm.py's
};
static_assert(sizeof(Line) == 128, "runtime/comm.py counts in lines of 128 bytes");
static_assert(std::atomic<int64_t>::is_always_lock_free, "flags between processes must be lock-free");

enum Kind : int64_t { BARRIER = 0, GATHER = 1, REDUCE = 2 };

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Added as a binary tree, ((0 + 1) + (2 + 3)) + ...: a stack holds the trees that are complete.
template <class T, class Out>
void reduce(const char* set, uint64_t ranks, int64_t capacity, Out* out, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int m = int(n - i < LANES ? n - i : LANES);
    F stack[6];
    for (uint64_t r = 0; r < ranks; ++r) {
      F* top = stack + std::popcount(r);
      *top = load(reinterpret_cast<const T*>(set + r * capacity) + i, m);
      for (int trees = r + 1 == ranks ? std::popcount(r) : std::countr_one(r); trees; --trees, --top) top[-1] = top[-1] + *top;
    }
    store(out + i, stack[0], m);
  }
}

}  // namespace

// Returns 0 when done, else a mask: bit r for a rank that hasn't come yet, bit 32 + r for one that has left. A rank
// that came with another kind or size is reported as -1 - r. With post = false it only waits on.
int64_t shm_exchange(const at::Tensor& memory, const at::Tensor& x, at::Tensor out, int64_t kind, int64_t rank,
                     int64_t ranks, int64_t capacity, int64_t number, bool post, int64_t spins, double seconds) {
  char* base = static_cast<char*>(memory.data_ptr());
  Line* lines = reinterpret_cast<Line*>(base);
  char* set = base + ranks * int64_t(sizeof(Line)) + (number & 1) * ranks * capacity;
  const int64_t bytes = kind == BARRIER ? 0 : int64_t(x.nbytes());
  TORCH_CHECK(bytes <= capacity && x.is_contiguous() && out.is_contiguous(), "an exchange must fit its slot");
  TORCH_CHECK(memory.nbytes() >= ranks * (sizeof(Line) + 2 * capacity), "the mapping is too small");
  const int64_t tag = bytes * 64 + kind * 16 + (kind == REDUCE ? int64_t(x.scalar_type()) % 16 : 0);
  if (post) {
    if (bytes) std::memcpy(set + rank * capacity, x.data_ptr(), bytes);
    lines[rank].tag[number & 1].store(tag, std::memory_order_relaxed);
    lines[rank].done.store(number, std::memory_order_release);
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t missing = 0;
  for (int64_t turn = 0;; ++turn) {
    missing = 0;
    for (int64_t r = 0; r < ranks; ++r)
      if (lines[r].done.load(std::memory_order_acquire) < number)
        missing |= int64_t(1) << r | (lines[r].left.load(std::memory_order_acquire) ? int64_t(1) << (32 + r) : 0);
    if (!missing) break;
    if (missing >> 32) {  // it may have finished its last exchange between the two looks
      int64_t gone = missing >> 32;
      for (int64_t r = 0; r < ranks; ++r)
        if ((gone >> r & 1) && lines[r].done.load(std::memory_order_acquire) >= number) gone &= ~(int64_t(1) << r);
      if (gone) return missing;
      continue;
    }
    if (turn < spins) {
      relax();
      continue;
    }
    if (turn % 16 == 0 && std::chrono::steady_clock::now() >= end) return missing;
    sched_yield();
  }
  for (int64_t r = 0; r < ranks; ++r)
    if (lines[r].tag[number & 1].load(std::memory_order_relaxed) != tag) return -1 - r;
  if (kind == GATHER) {
    for (int64_t r = 0; r < ranks; ++r)
      std::memcpy(static_cast<char*>(out.data_ptr()) + r * bytes, set + r * capacity, bytes);
  } else if (kind == REDUCE) {
    by_dtype(x.scalar_type(), [&](auto* type) {
      typedef std::remove_pointer_t<decltype(type)> T;
      by_dtype(out.scalar_type(), [&](auto* out_type) {
        reduce<T>(set, ranks, capacity, static_cast<decltype(out_type)>(out.data_ptr()), x.numel());
      });
    });
  }
  return 0;
}

// Marks this rank as gone, so that the others needn't wait for their timeout.
void shm_leave(const at::Tensor& memory, int64_t rank) {
  static_cast<Line*>(memory.data_ptr())[rank].left.store(1, std::memory_order_release);
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "shm_exchange(Tensor memory, Tensor x, Tensor(a!) out, int kind, int rank, int ranks, int capacity, int number, "
      "bool post, int spins, float seconds) -> int",
      &quasar::shm_exchange);
  m.def("shm_leave(Tensor memory, int rank) -> ()", &quasar::shm_leave);
}
