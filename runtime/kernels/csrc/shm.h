// Exchanges between the ranks of a host; `shm.cpp` says how.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

namespace quasar {

enum Kind : int64_t { BARRIER = 0, GATHER = 1, REDUCE = 2 };

// This rank's end of the memory that the ranks share.
struct Exchange : torch::CustomClassHolder {
  Exchange(at::Tensor memory, int64_t rank, int64_t ranks, int64_t capacity, int64_t spins);

  // Writes what this rank has to say, x of at most `capacity` bytes.
  void begin(const at::Tensor& x, int64_t kind);

  // Waits for the others, and takes in what was begun last, of the same x. Returns 0 when done, else a mask: bit r for a rank
  // that hasn't come yet, bit 32 + r for one that has left. A rank that came with another kind or size is reported as -1 - r.
  int64_t end(const at::Tensor& x, at::Tensor out, int64_t kind, double seconds);

  // Both for x of any size, in pieces; `seconds` for each.
  int64_t all_reduce(const at::Tensor& x, at::Tensor out, double seconds);

  // Marks this rank as gone, so that the others needn't wait for their timeout.
  void leave();

 private:
  char* set() const;
  static int64_t tag(const at::Tensor& x, int64_t kind);

  at::Tensor memory;
  int64_t rank, ranks, capacity, spins;
  int64_t number = 0;  // of exchanges begun
};

}  // namespace quasar
