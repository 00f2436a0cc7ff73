// Runs CUDA kernels on the CPU: a fiber a CUDA thread, a block after the other. This is the part that kernels see
// through cuda_runtime.h; the scheduler is simt.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

enum class Wait : int { kNothing, kBlock, kWarp, kYield };

// What one lane brings to a warp intrinsic, and takes from it.
struct Exchange {
    unsigned mask;    // lanes that take part
    int line;         // of the source: all lanes must stand at the same
    bool votes;       // a ballot, else a shuffle
    int source;       // lane whose value a shuffle takes
    uint64_t value;
    uint64_t result;
};

struct Thread {
    uint3 index;
    unsigned linear;
    Wait wait;
    int line;           // of the barrier
    unsigned barriers;  // passed so far
    Exchange exchange;
    void* fiber;
};

extern Thread* current;
extern uint3 block_index;
extern dim3 block_shape;
extern dim3 grid_shape;

// Memory order as CUDA defines it: __syncthreads and __syncwarp order what threads wrote, votes and shuffles do not.
void sync_block(int line);
void sync_warp(unsigned mask, int line);
uint64_t exchange(unsigned mask, int line, bool votes, int source, uint64_t value);
void yield();  // lets other threads of the block run

// Runs body(argument) once for every thread of the grid. `schedule` 0 goes in order, 1 in reverse, others shuffle
// threads and blocks. Null, or what went wrong: a barrier that not all threads reach, threads at different ones, a
// deadlock, a launch that no GPU takes. Of the grid only the blocks from `first` on are run, along each axis.
const char* run(dim3 grid, dim3 block, unsigned schedule, void (*body)(const void*), const void* argument,
                uint3 first = {0, 0, 0});

}  // namespace simt
