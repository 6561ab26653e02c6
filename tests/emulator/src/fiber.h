// A stack and a place to go on from. Switching saves the callee-saved registers, nothing else.
#pragma once

#include <cstddef>

namespace internvl::emulator {

struct Fiber {
  void* context = nullptr;
};

// Stacks of equal size in one mapping; the page below each stays inaccessible.
class FiberStacks {
 public:
  ~FiberStacks();
  // Makes room for `count` fibers.
  void reserve(size_t count);
  // Fiber `index` will begin with `entry`, which must never return.
  void prepare(Fiber& fiber, size_t index, void (*entry)());

 private:
  char* memory_ = nullptr;
  size_t count_ = 0;
};

// Leaves `from` and goes on in `to`; returns when somebody switches back to `from`.
void switch_fiber(Fiber& from, const Fiber& to);

}  // namespace internvl::emulator
