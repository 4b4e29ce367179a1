// Loops over threads, and threads that stay together from one loop to the next.
//
// A pass is some two hundred loops of a few microseconds to a fraction of a millisecond. OpenMP's threads, if they are not to
// spin for milliseconds, sleep between most of them, and waking one takes as long as the shorter loops do. So a pass is one
// parallel region, in which threads wait for the next loop, giving way to whoever else wants the core. Each begins with a part
// of its own and helps others with theirs when it is done: nobody waits for a thread that got no time.
#pragma once

#include <c10/util/FunctionRef.h>
#include <sched.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quasar {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// What to do while something hasn't come: spin a little, then give way.
class Patience {
 public:
  explicit Patience(int64_t spins) : left_(spins) {}
  void operator()() {
    if (left_-- > 0) relax();
    else sched_yield();
  }

 private:
  int64_t left_;
};

// Calls loop(begin, end) for parts of 0..count, which together are all of it, of at most `grain` each where there are several,
// on torch's threads. A loop holds no other. Raises what the loop raises.
void parallel_for(int64_t count, int64_t grain, c10::function_ref<void(int64_t, int64_t)> loop);

// Runs `pass`, all of whose loops are shared with the same threads. Raises what it raises.
void together(c10::function_ref<void()> pass);

}  // namespace quasar
