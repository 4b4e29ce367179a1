// One exchange between the ranks of a host through a file mapped in memory.
//
// The file holds one line of flags per rank, then two sets of one slot per rank. Exchange number s uses set s % 2:
// a rank writes its slot, publishes s, waits until every rank has published s, and reads all slots in rank order. A
// slot is written again at s + 2, which its owner reaches only after everybody has published s + 1, that is, has
// finished reading s; so one wait per exchange is enough.
#include "shm.h"

#include <atomic>
#include <bit>
#include <chrono>

#include "simd.h"
#include "team.h"

namespace quasar {
namespace {

struct alignas(128) Line {
  std::atomic<int64_t> done;     // the last exchange this rank has written
  std::atomic<int64_t> tag[2];   // what it is, by parity: kind and bytes
  std::atomic<int64_t> left;     // set when the rank closes or gives up
  int64_t attached, ready;       // the handshake at the start, runtime/shared_memory.py's
};
static_assert(sizeof(Line) == 128, "runtime/shared_memory.py counts in lines of 128 bytes");
static_assert(std::atomic<int64_t>::is_always_lock_free, "flags between processes must be lock-free");

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

void Exchange::leave() { static_cast<Line*>(memory.data_ptr())[rank].left.store(1, std::memory_order_release); }

void Exchange::begin(const at::Tensor& x, int64_t kind) {
  ++number;
  Line& line = static_cast<Line*>(memory.data_ptr())[rank];
  const int64_t bytes = kind == BARRIER ? 0 : int64_t(x.nbytes());
  TORCH_CHECK(bytes <= capacity && x.is_contiguous(), "an exchange must fit its slot");
  if (bytes) std::memcpy(set() + rank * capacity, x.data_ptr(), bytes);
  line.tag[number & 1].store(tag(x, kind), std::memory_order_relaxed);
  line.done.store(number, std::memory_order_release);
}

int64_t Exchange::end(const at::Tensor& x, at::Tensor out, int64_t kind, double seconds) {
  const Line* lines = static_cast<const Line*>(memory.data_ptr());
  TORCH_CHECK(out.is_contiguous(), "an exchange must be contiguous");
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t missing = 0;
  Patience wait(spins);
  for (int64_t turn = 1;; ++turn) {
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
    if (turn % 16 == 0 && turn > spins && std::chrono::steady_clock::now() >= end) return missing;
    wait();
  }
  for (int64_t r = 0; r < ranks; ++r)
    if (lines[r].tag[number & 1].load(std::memory_order_relaxed) != tag(x, kind)) return -1 - r;
  if (kind == GATHER) {
    const int64_t bytes = int64_t(x.nbytes());
    for (int64_t r = 0; r < ranks; ++r)
      std::memcpy(static_cast<char*>(out.data_ptr()) + r * bytes, set() + r * capacity, bytes);
  } else if (kind == REDUCE) {
    by_dtype(x.scalar_type(), [&](auto* type) {
      typedef std::remove_pointer_t<decltype(type)> T;
      by_dtype(out.scalar_type(), [&](auto* out_type) {
        reduce<T>(set(), ranks, capacity, static_cast<decltype(out_type)>(out.data_ptr()), x.numel());
      });
    });
  }
  return 0;
}

int64_t Exchange::all_reduce(const at::Tensor& x, at::Tensor out, double seconds) {
  const at::Tensor from = x.view(-1), to = out.view(-1);
  const int64_t step = capacity / int64_t(x.element_size());
  for (int64_t i = 0; i < x.numel(); i += step) {
    const at::Tensor part = from.slice(0, i, i + step);
    begin(part, REDUCE);
    if (const int64_t state = end(part, to.slice(0, i, i + step), REDUCE, seconds)) return state;
  }
  return 0;
}

char* Exchange::set() const {
  return static_cast<char*>(memory.data_ptr()) + ranks * int64_t(sizeof(Line)) + (number & 1) * ranks * capacity;
}

int64_t Exchange::tag(const at::Tensor& x, int64_t kind) {
  return (kind == BARRIER ? 0 : int64_t(x.nbytes())) * 64 + kind * 16 + (kind == REDUCE ? int64_t(x.scalar_type()) % 16 : 0);
}

Exchange::Exchange(at::Tensor memory, int64_t rank, int64_t ranks, int64_t capacity, int64_t spins)
    : memory(std::move(memory)), rank(rank), ranks(ranks), capacity(capacity), spins(spins) {
  TORCH_CHECK(int64_t(this->memory.nbytes()) >= ranks * (int64_t(sizeof(Line)) + 2 * capacity), "the mapping is too small");
}

}  // namespace quasar
