// Memory for logits caches and for gradients of weights. The last block of each that was given back
// is held for the next: it is large and written whole, and pages fresh from the system cost more time
// than the numbers in them.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "head.h"

namespace mcpo {

class Pool {
 public:
  // Never destroyed, since a tensor may outlive every static object.
  static Pool& logits() {
    static Pool* pool = new Pool;
    return *pool;
  }

  static Pool& gradients() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // Uninitialised, as at::empty. The memory comes back when the tensor dies.
  at::Tensor take(at::IntArrayRef sizes, at::ScalarType dtype) {
    const int64_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
    if (bytes == 0) return at::empty(sizes, dtype);
    Block block = find(bytes);
    return at::from_blob(
        block.data, sizes, [this, block](void*) { give_back(block); }, at::dtype(dtype));
  }

  // Bytes held for the next block.
  int64_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_.bytes;
  }

  void clear() { std::free(swap({}).data); }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };

  Block find(int64_t bytes) {
    const int64_t size = round_up(bytes, kLargePage);
    Block block = swap({});
    // Not one that is much too large, or a small cache would take a large one's memory away.
    if (size <= block.bytes && block.bytes <= 2 * size) return block;
    std::free(block.data);
    block = {std::aligned_alloc(kLargePage, size), size};
    TORCH_CHECK(block.data, "no memory for ", size >> 20,
                " MiB; a lower cache_mb keeps fewer logits");
    use_large_pages(block.data, block.bytes);
    return block;
  }

  void give_back(Block block) {
    std::free(swap(block).data);
  }

  Block swap(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(held_, block);
    return block;
  }

  std::mutex mutex_;
  Block held_;
};

}  // namespace mcpo
