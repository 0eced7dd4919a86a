// Memory that a thread keeps for what its kernels need within one call. Fresh memory comes from the system page by page,
// and the first touch of a page takes several times as long as to fill it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace tensortrain {

// Numbers that hold nothing yet, until the room ends. Rooms may lie within each other.
class Room {
 public:
  Room() : block_(mine().block), at_(mine().at) {}
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() {
    auto& kept = mine();
    kept.block = block_, kept.at = at_;
    if (block_ == 0 && at_ == 0) kept.shrink();
  }

  template <typename T>
  T* take(int64_t n) {
    return static_cast<T*>(mine().take((static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64));
  }

 private:
  static constexpr size_t block_bytes = size_t{1} << 20, most_kept_bytes = size_t{1} << 25;

  struct Block {
    std::unique_ptr<char[]> data;
    size_t size;
  };
  struct Kept {
    std::vector<Block> blocks;
    size_t block = 0, at = 0;

    // Vectors lie on their own borders.
    static char* start(const Block& one) {
      return one.data.get() + (64 - reinterpret_cast<uintptr_t>(one.data.get()) % 64) % 64;
    }
    void* take(size_t n) {
      while (block < blocks.size() && at + n > blocks[block].size) ++block, at = 0;
      if (block == blocks.size()) {
        const size_t size = n > block_bytes ? n : block_bytes;
        blocks.push_back({std::unique_ptr<char[]>(new char[size + 64]), size});
      }
      char* const found = start(blocks[block]) + at;
      at += n;
      return found;
    }
    void shrink() {
      size_t total = 0;
      for (const auto& one : blocks) total += one.size;
      if (total > most_kept_bytes) blocks.clear();
    }
  };
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }

  size_t block_, at_;
};

}  // namespace tensortrain
