// The scheduler of simt.h. Compiled without sanitizers, which are told by hand what happens: address sanitizer which
// stack is in use, thread sanitizer who waits for whom. Switching fibers tells it nothing, so that two CUDA threads
// that touch the same memory without a barrier between them are a race although one thread of the system runs both.
#include "simt.h"

#include <stdlib.h>

#include <algorithm>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_java_init(uintptr_t, uintptr_t);
void __tsan_java_alloc(uintptr_t, uintptr_t);
void __tsan_java_free(uintptr_t, uintptr_t);
}
#endif

extern "C" {
extern char __start_simt_shared[] __attribute__((weak));
extern char __stop_simt_shared[] __attribute__((weak));
}

namespace simt {

Thread* current;
uint3 block_index;
dim3 block_shape;
dim3 grid_shape;

namespace {

constexpr size_t kStackBytes = 64 << 10;

// ---- contexts ----

#if defined(__x86_64__)
// swapcontext asks the kernel to change the signal mask each time; this is twenty times as fast.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
    .text
    .globl simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
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
    .size simt_switch, .-simt_switch
)");
using Context = void*;
void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    top -= 2;  // entry finds the stack as a call leaves it: 8 past a multiple of 16
    top[0] = reinterpret_cast<void*>(entry);
    context = top - 6;  // six registers, whatever they hold
}
void change(Context& from, Context& to) { simt_switch(&from, to); }
#else
using Context = ucontext_t;
void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
    Thread thread;
    Context context;
    char* stack = nullptr;
    bool finished = false;
    void* fake_stack = nullptr;
    void* sanitizer = nullptr;

    Fiber() = default;
    Fiber(Fiber&& other) noexcept : stack(std::exchange(other.stack, nullptr)) {}
    ~Fiber() { free(stack); }
};

struct {
    Context context;
    void (*body)(const void*);
    const void* argument;
    const void* stack = nullptr;
    size_t stack_size = 0;
    void* fake_stack = nullptr;
    void* sanitizer = nullptr;
    // Addresses that mean orders to the thread sanitizer. Each block has its own barriers: blocks are not ordered.
    char launch, launch_end;
    struct {
        char block[2], warp[32];
    }* barriers;
} scheduler;

Fiber& running() { return *static_cast<Fiber*>(current->fiber); }

void released([[maybe_unused]] void* at) {
#ifdef SIMT_TSAN
    __tsan_release(at);
#endif
}

void acquired([[maybe_unused]] void* at) {
#ifdef SIMT_TSAN
    __tsan_acquire(at);
#endif
}

void to_scheduler([[maybe_unused]] bool for_good) {
    Fiber& fiber = running();
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler.stack, scheduler.stack_size);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(scheduler.sanitizer, 1);  // 1: the switch orders nothing
#endif
    change(fiber.context, scheduler.context);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.stack, &scheduler.stack_size);
#endif
}

void to_fiber(Fiber& fiber) {
    current = &fiber.thread;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack, kStackBytes);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(fiber.sanitizer, 1);
#endif
    change(scheduler.context, fiber.context);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void entry() {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
    acquired(&scheduler.launch);
    scheduler.body(scheduler.argument);
    released(&scheduler.launch_end);
    running().finished = true;
    to_scheduler(true);
}

// ---- one block ----

// Threads at a barrier go on when all do. A thread that left while others wait is an error, as CUDA says that all
// threads of the block must reach it.
const char* open_block_barrier(Fiber* fibers, unsigned count, bool& moved) {
    const Fiber* waiting = nullptr;
    for (unsigned i = 0; i < count; ++i) {
        const Fiber& fiber = fibers[i];
        if (!fiber.finished && fiber.thread.wait != Wait::kBlock) return nullptr;
        if (!fiber.finished) {
            if (waiting && waiting->thread.line != fiber.thread.line)
                return "threads of one block wait at different barriers";
            waiting = &fiber;
        }
    }
    if (!waiting) return nullptr;
    for (unsigned i = 0; i < count; ++i) {
        if (fibers[i].finished) return "threads of the block have left while others wait at a barrier";
        fibers[i].thread.wait = Wait::kNothing;
    }
    moved = true;
    return nullptr;
}

const char* serve_warp(Fiber* lanes, unsigned count, bool& moved) {
    unsigned here = 0;
    for (unsigned lane = 0; lane < count; ++lane)
        if (!lanes[lane].finished && lanes[lane].thread.wait == Wait::kWarp) here |= 1u << lane;
    while (here) {
        const unsigned leader = static_cast<unsigned>(__builtin_ctz(here));
        const Exchange& first = lanes[leader].thread.exchange;
        const unsigned existing = count == 32 ? ~0u : (1u << count) - 1;
        const unsigned wanted = first.mask & existing;
        if (!(wanted >> leader & 1)) return "a lane is not in the mask that it gives to a warp intrinsic";
        if ((wanted & here) != wanted) {  // some are still on their way; lanes of other masks may be ready
            here &= ~(1u << leader);
            continue;
        }
        unsigned votes = 0;
        for (unsigned lane = 0; lane < count; ++lane) {
            if (!(wanted >> lane & 1)) continue;
            const Exchange& other = lanes[lane].thread.exchange;
            if (other.mask != first.mask || other.line != first.line || other.votes != first.votes)
                return "lanes of one warp wait at different warp intrinsics, or give different masks";
            if (other.votes && other.value) votes |= 1u << lane;
            if (!other.votes && !(wanted >> other.source & 1)) return "a shuffle reads a lane that is not there";
        }
        for (unsigned lane = 0; lane < count; ++lane) {
            if (!(wanted >> lane & 1)) continue;
            Exchange& own = lanes[lane].thread.exchange;
            own.result = own.votes ? votes : lanes[own.source].thread.exchange.value;
            lanes[lane].thread.wait = Wait::kNothing;
        }
        here &= ~wanted;
        moved = true;
    }
    return nullptr;
}

// A block finds its shared memory full of rubbish: as a float 0.046, as a key one in the middle, as an index far out.
// The thread sanitizer is told that it is not the last block's, by its interface for garbage collectors, the only one
// that makes it forget.
void renew_shared_memory() {
    for (char* byte = __start_simt_shared; byte < __stop_simt_shared; ++byte) *byte = static_cast<char>(0x3d);
#ifdef SIMT_TSAN
    const uintptr_t begin = reinterpret_cast<uintptr_t>(__start_simt_shared) & ~uintptr_t{15};
    const uintptr_t bytes = (reinterpret_cast<uintptr_t>(__stop_simt_shared) - begin + 15) & ~uintptr_t{15};
    static bool first = true;
    if (first) __tsan_java_init(begin, bytes);
    else __tsan_java_free(begin, bytes);
    first = false;
    __tsan_java_alloc(begin, bytes);
#endif
}

const char* run_block(Fiber* fibers, unsigned count, std::mt19937& random, unsigned schedule) {
    renew_shared_memory();
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, kStackBytes));
        fiber.thread = Thread{};
        fiber.thread.linear = order[i] = i;
        fiber.thread.index = {i % block_shape.x, i / block_shape.x % block_shape.y,
                              i / (block_shape.x * block_shape.y)};
        fiber.thread.fiber = &fiber;
        fiber.finished = false;
#ifdef SIMT_ASAN
        __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
        prepare(fiber.context, fiber.stack, entry);
#ifdef SIMT_TSAN
        if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
#endif
    }
    if (schedule == 1) std::reverse(order.begin(), order.end());
    const char* problem = nullptr;
    for (unsigned alive = count; alive && !problem;) {
        if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
        bool moved = false;
        for (unsigned i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.finished || (fiber.thread.wait != Wait::kNothing && fiber.thread.wait != Wait::kYield)) continue;
            fiber.thread.wait = Wait::kNothing;
            to_fiber(fiber);
            moved = true;
            alive -= fiber.finished;
        }
        problem = open_block_barrier(fibers, count, moved);
        for (unsigned begin = 0; begin < count && !problem; begin += 32)
            problem = serve_warp(&fibers[begin], std::min(32u, count - begin), moved);
        if (!moved && !problem && alive) problem = "deadlock: threads wait at a barrier that others never reach";
    }
    return problem;
}

}  // namespace

void sync_block(int line) {
    // Two addresses in turn: who waits at the next barrier does not release to those that leave this one.
    char* at = &scheduler.barriers->block[current->barriers++ & 1];
    current->line = line;
    current->wait = Wait::kBlock;
    released(at);
    to_scheduler(false);
    acquired(at);
}

void sync_warp(unsigned mask, int line) {
    char* at = &scheduler.barriers->warp[current->linear / 32];
    released(at);
    exchange(mask, line, true, 0, 0);
    acquired(at);
}

uint64_t exchange(unsigned mask, int line, bool votes, int source, uint64_t value) {
    current->exchange = {mask, line, votes, source, value, 0};
    current->wait = Wait::kWarp;
    to_scheduler(false);
    return current->exchange.result;
}

void yield() {
    current->wait = Wait::kYield;
    to_scheduler(false);
}

const char* run(dim3 grid, dim3 block, unsigned schedule, void (*body)(const void*), const void* argument,
                uint3 first) {
    const size_t threads = size_t{block.x} * block.y * block.z;
    const size_t columns = grid.x - first.x, rows = grid.y - first.y;
    const size_t blocks = columns * rows * (grid.z - first.z);
    if (threads == 0 || threads > 1024 || block.z > 64) return "a block must have 1 to 1024 threads";
    if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return "a grid must not be empty, nor over 65535 in y or z";
    scheduler.body = body;
    scheduler.argument = argument;
    grid_shape = grid;
    block_shape = block;
#ifdef SIMT_TSAN
    scheduler.sanitizer = __tsan_get_current_fiber();
#endif
    released(&scheduler.launch);
    std::mt19937 random(schedule);
    std::vector<size_t> order(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = schedule == 1 ? blocks - 1 - i : i;
    if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
    // Kept, or the time would go into making them. Two sets in turn: the thread sanitizer takes what one fiber does as
    // ordered, and neighbouring blocks are not.
    static std::vector<Fiber> fibers[2] = {std::vector<Fiber>(1024), std::vector<Fiber>(1024)};
    unsigned set = 0;
    std::vector<std::remove_pointer_t<decltype(scheduler.barriers)>> barriers(blocks);
    scheduler.barriers = barriers.data();
    const char* problem = nullptr;
    for (size_t at : order) {
        block_index = {first.x + static_cast<unsigned>(at % columns),
                       first.y + static_cast<unsigned>(at / columns % rows),
                       first.z + static_cast<unsigned>(at / (columns * rows))};
        problem = run_block(fibers[set ^= 1].data(), static_cast<unsigned>(threads), random, schedule);
        if (problem) break;
        ++scheduler.barriers;
    }
    acquired(&scheduler.launch_end);
    return problem;
}

}  // namespace simt
