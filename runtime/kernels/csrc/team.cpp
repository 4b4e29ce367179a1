#include "team.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

namespace quasar {
namespace {

using Loop = c10::function_ref<void(int64_t, int64_t)>;

constexpr int64_t SPINS = 200;  // some microseconds: most loops follow the one before within them

// One thread leads: it opens a loop, works, closes it, and waits for those that are still inside. Who comes late finds the
// door closed, so that a thread without a core delays no one.
class Team {
 public:
  explicit Team(int64_t size) : parts_(size) {}

  static thread_local Team* led;  // by this thread

  // The leader's part of a loop.
  void share(int64_t count, int64_t grain, const Loop& loop) {
    const int64_t size = int64_t(parts_.size());
    loop_ = &loop;
    grain_ = grain;
    failed_.store(false, std::memory_order_relaxed);
    for (int64_t m = 0; m < size; ++m)
      parts_[m].range.store(range(count * m / size, count * (m + 1) / size), std::memory_order_relaxed);
    door_.fetch_add(LOOP, std::memory_order_release);
    work(0);
    door_.fetch_add(LOOP, std::memory_order_relaxed);
    for (Patience wait(SPINS); door_.load(std::memory_order_acquire) % LOOP; wait()) {}
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(failure_);
  }

  // Everybody else's, until the leader says that it is over.
  void help(int64_t member) {
    uint64_t done = 0;
    for (Patience wait(SPINS);;) {
      uint64_t door = door_.load(std::memory_order_acquire);
      const uint64_t number = door / LOOP;
      if (number == OVER) return;
      if (number % 2 == 0 || number == done) {
        wait();
      } else if (door_.compare_exchange_weak(door, door + 1, std::memory_order_acquire)) {
        work(member);
        door_.fetch_sub(1, std::memory_order_release);
        done = number;
        wait = Patience(SPINS);
      }
    }
  }

  void dismiss() { door_.store(OVER * LOOP, std::memory_order_release); }

 private:
  // The door: how often it was opened or closed, so odd while a loop is open, and how many helpers are inside.
  static constexpr uint64_t LOOP = 1 << 16, OVER = ~uint64_t(0) / LOOP;

  struct alignas(64) Part {
    std::atomic<uint64_t> range{0};
  };

  static uint64_t range(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // A member's own part from its front on, so that memory is read from end to end, then the others' from behind.
  void work(int64_t member) {
    const int64_t size = int64_t(parts_.size());
    try {
      for (int64_t i = 0; i < size; ++i)
        while (take(parts_[(member + i) % size].range, i == 0)) {}
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }

  bool take(std::atomic<uint64_t>& part, bool own) {
    uint64_t old = part.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = int64_t(old >> 32), end = int64_t(old & 0xffffffffu);
      if (begin >= end) return false;
      const int64_t some = std::min(grain_, end - begin), first = own ? begin : end - some;
      const uint64_t rest = own ? range(begin + some, end) : range(begin, end - some);
      if (!part.compare_exchange_weak(old, rest, std::memory_order_relaxed)) continue;
      (*loop_)(first, first + some);
      return true;
    }
  }

  alignas(64) std::atomic<uint64_t> door_{0};
  std::vector<Part> parts_;
  const Loop* loop_ = nullptr;
  int64_t grain_ = 1;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  // the first; read once everybody is out
};

thread_local Team* Team::led = nullptr;

// Whether there is nobody to share with: one thread, or all at work already, this one among them.
bool alone() { return at::get_num_threads() == 1 || at::in_parallel_region(); }

}  // namespace

void parallel_for(int64_t count, int64_t grain, Loop loop) {
  if (count <= grain || (!Team::led && alone())) {
    if (count > 0) loop(0, count);
  } else {
    together([&] { Team::led->share(count, grain, loop); });
  }
}

void together(c10::function_ref<void()> pass) {
  if (Team::led || alone()) return pass();
  const int64_t threads = at::get_num_threads();
  Team team(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin) return team.help(begin);
    struct Leading {
      explicit Leading(Team& team) { Team::led = &team; }
      ~Leading() {
        Team::led->dismiss();
        Team::led = nullptr;
      }
    } leading(team);
    pass();
  });
}

}  // namespace quasar
