// Loops on the threads that torch computes with. Compiled without OpenMP, at::parallel_for is a plain loop; torch's own
// library has brought OpenMP's run time along, whichever it is, and GNU's entry is known to all of them.
#pragma once

#include "crew.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned n_threads, unsigned flags);
__attribute__((weak)) int omp_in_parallel(void);
}

namespace tensortrain {

// While it lives, loops stay on the thread that asked: to wake another may take longer than all of a small job.
class LoneLoops {
 public:
  explicit LoneLoops(bool are_small) : before_(are_asked()) { are_asked() = before_ || are_small; }
  ~LoneLoops() { are_asked() = before_; }
  LoneLoops(const LoneLoops&) = delete;
  LoneLoops& operator=(const LoneLoops&) = delete;

  static bool& are_asked() {
    static thread_local bool asked = false;
    return asked;
  }

 private:
  bool before_;
};

// Calls work(first, last) for parts of 0 .. n that threads take as they come; a part is `grain` long.
template <typename Work>
void on_threads(int64_t n, int64_t grain, bool is_large, const Work& work) {
  grain = std::max<int64_t>(grain, 1);
  const auto n_threads = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  const bool can_share = GOMP_parallel != nullptr && omp_in_parallel != nullptr;
  if (!is_large || n_threads < 2 || !can_share || LoneLoops::are_asked() || omp_in_parallel() != 0) {
    if (n > 0) work(int64_t{0}, n);
    return;
  }
  struct Shared {
    const Work& work;
    std::atomic<int64_t> next;
    int64_t n, grain;
    std::atomic<bool> has_failed;
    std::exception_ptr error;
    Crew* crew;  // to meet, if any
  } shared{work, {0}, n, grain, {false}, nullptr, nullptr};
  Crew& crew = Crew::mine();
  const Crew::Apart apart(crew);
  if (apart.was_asleep()) shared.crew = &crew;
  GOMP_parallel(
      [](void* data) {
        auto& all = *static_cast<Shared*>(data);
        if (all.crew) all.crew->meet();
        try {
          for (auto first = all.next.fetch_add(all.grain); first < all.n; first = all.next.fetch_add(all.grain))
            all.work(first, std::min(first + all.grain, all.n));
        } catch (...) {  // must not leave a region of C
          if (!all.has_failed.exchange(true)) all.error = std::current_exception();
          all.next = all.n;
        }
      },
      &shared, static_cast<unsigned>(n_threads), 0);
  if (shared.has_failed) std::rethrow_exception(shared.error);
}

// Wakes the threads for what BLAS is about to give them.
inline void rouse() {
  if (Crew::mine().may_sleep()) on_threads(at::get_num_threads(), 1, true, [](int64_t, int64_t) {});
}

}  // namespace tensortrain
