#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(INTERNVL_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define INTERNVL_EMULATOR_UCONTEXT 1
#endif

#if defined(INTERNVL_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace internvl::emulator {
namespace {

constexpr size_t kStackBytes = 192 * 1024;
// The tops of the stacks are staggered: at equal offsets all fibers would share a few cache sets.
constexpr size_t kStaggerBytes = 17 * 64;
constexpr size_t kStaggers = 61;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

FiberStacks::~FiberStacks() {
  if (memory_) munmap(memory_, count_ * kStackBytes);
}

void FiberStacks::reserve(size_t count) {
  if (count <= count_) return;
  if (memory_) munmap(memory_, count_ * kStackBytes);
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStackBytes, page_bytes(), PROT_NONE);
}

#if defined(INTERNVL_EMULATOR_UCONTEXT)

namespace {

std::vector<ucontext_t*>& contexts() {
  static std::vector<ucontext_t*> all;
  return all;
}

ucontext_t* context_of(const Fiber& fiber) { return static_cast<ucontext_t*>(fiber.context); }

}  // namespace

void FiberStacks::prepare(Fiber& fiber, size_t index, void (*entry)()) {
  while (contexts().size() <= index) contexts().push_back(new ucontext_t);
  ucontext_t* context = contexts()[index];
  getcontext(context);
  context->uc_stack.ss_sp = memory_ + index * kStackBytes + page_bytes();
  context->uc_stack.ss_size = kStackBytes - page_bytes();
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.context = context;
}

void switch_fiber(Fiber& from, const Fiber& to) {
  static ucontext_t outside;  // of the caller of the grid: one grid runs at a time
  if (!from.context) from.context = &outside;
  swapcontext(context_of(from), context_of(to));
}

#else

// internvl_switch_stack(void** from, void* to): pushes the registers that a call must preserve,
// stores the stack pointer in *from, takes `to` as the stack pointer and pops.
#if defined(__x86_64__)

asm(R"(
    .text
    .align 16
    .local internvl_switch_stack
    .type internvl_switch_stack, @function
internvl_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size internvl_switch_stack, .-internvl_switch_stack
)");

constexpr size_t kReturnWord = 6;  // after the saved registers
constexpr size_t kFrameWords = 8;  // keeps the stack as aligned as after a call

#else

asm(R"(
    .text
    .align 4
    .local internvl_switch_stack
    .type internvl_switch_stack, %function
internvl_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size internvl_switch_stack, .-internvl_switch_stack
)");

constexpr size_t kReturnWord = 11;  // x30
constexpr size_t kFrameWords = 20;

#endif

extern "C" void internvl_switch_stack(void** from, void* to);

void FiberStacks::prepare(Fiber& fiber, size_t index, void (*entry)()) {
  char* top = memory_ + (index + 1) * kStackBytes - (index % kStaggers) * kStaggerBytes - 256;
  auto* frame =
      reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63}) - kFrameWords;
  for (size_t i = 0; i < kFrameWords; ++i) frame[i] = 0;
  frame[kReturnWord] = reinterpret_cast<uint64_t>(entry);
  fiber.context = frame;
}

void switch_fiber(Fiber& from, const Fiber& to) {
  internvl_switch_stack(&from.context, to.context);
}

#endif

}  // namespace internvl::emulator
