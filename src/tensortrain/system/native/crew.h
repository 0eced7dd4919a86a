// The threads that help the one that asks, woken where they can run at once.
//
// A thread that has fallen asleep is often woken on the processor of the one that wakes it. There it waits until that one
// has spun in vain for some milliseconds: longer than most calls take. So for the time of waking the others are kept away
// from that processor, which is all that is changed and put back.
#pragma once

#include <array>
#include <atomic>
#include <chrono>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tensortrain {

#if defined(__linux__)

class Crew {
  static constexpr int most = 16;  // beyond so many there is always a processor that is free

 public:
  static Crew& mine() {
    static thread_local Crew crew;
    return crew;
  }

  // For every thread of a region that `ask` begins.
  void meet() {
    const auto me = static_cast<pid_t>(syscall(SYS_gettid));
    if (me == asked_) return;
    const int at = n_.fetch_add(1);
    if (at < most) members_[at] = me;
  }

  // While it lives, those that may have fallen asleep run on other processors than this thread.
  class Apart {
   public:
    explicit Apart(Crew& crew) : crew_(crew) {
      if (!crew.may_sleep()) return;
      n_ = std::min(crew.n_.load(), most);
      const int here = sched_getcpu();
      members_ = crew.members_;
      for (int k = 0; k < n_; ++k) moved_[k] = here >= 0 && move(members_[k], here, before_[k]);
      crew.asked_ = static_cast<pid_t>(syscall(SYS_gettid));
      crew.n_ = 0;
      was_asleep_ = true;
    }
    ~Apart() {
      if (was_asleep_)
        for (int k = 0; k < n_; ++k)
          if (moved_[k]) sched_setaffinity(members_[k], sizeof(cpu_set_t), &before_[k]);
      crew_.used_ = Clock::now();
    }
    Apart(const Apart&) = delete;
    Apart& operator=(const Apart&) = delete;

    bool was_asleep() const { return was_asleep_; }

   private:
    static bool move(pid_t member, int here, cpu_set_t& before) {
      // Numbers of threads that have ended are given to others.
      if (syscall(SYS_tgkill, getpid(), member, 0) != 0) return false;
      if (sched_getaffinity(member, sizeof(cpu_set_t), &before) != 0) return false;
      cpu_set_t elsewhere = before;
      CPU_CLR(here, &elsewhere);
      return CPU_COUNT(&elsewhere) > 0 && sched_setaffinity(member, sizeof(cpu_set_t), &elsewhere) == 0;
    }

    Crew& crew_;
    int n_ = 0;
    bool was_asleep_ = false;
    std::array<pid_t, most> members_{};
    std::array<bool, most> moved_{};
    std::array<cpu_set_t, most> before_;
  };

  // Threads that have nothing to do look out for more for about so long.
  bool may_sleep() const { return Clock::now() - used_ > std::chrono::milliseconds(1); }

 private:
  using Clock = std::chrono::steady_clock;

  pid_t asked_ = 0;
  std::atomic<int> n_{0};
  std::array<pid_t, most> members_{};
  Clock::time_point used_{};
};

#else

class Crew {
 public:
  static Crew& mine() {
    static thread_local Crew crew;
    return crew;
  }
  void meet() {}
  bool may_sleep() const { return false; }
  struct Apart {
    explicit Apart(Crew&) {}
    bool was_asleep() const { return false; }
  };
};

#endif

}  // namespace tensortrain
