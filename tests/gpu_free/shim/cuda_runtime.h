// The part of CUDA that the kernels use, for a C++ compiler: found instead of NVIDIA's through the include path.
#pragma once
#include <math.h>
#include <string.h>

#include "simt.h"

#define __global__
#define __device__ static
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// In a section of their own, so that each block finds them full of rubbish, as on a GPU.
#define __shared__ static __attribute__((section("simt_shared")))

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_shape)
#define gridDim (simt::grid_shape)

static inline void __syncthreads(int line = __builtin_LINE()) { simt::sync_block(line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { simt::sync_warp(mask, line); }

static inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<unsigned>(simt::exchange(mask, line, true, 0, predicate != 0));
}
static inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, !predicate, line) == 0;
}

namespace simt {
template <class T>
T shuffle(unsigned mask, int line, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, line, false, source, bits);
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline int lane() { return static_cast<int>(current->linear % 32); }
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
    return simt::shuffle(mask, line, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int line = __builtin_LINE()) {
    return simt::shuffle(mask, line, value, (simt::lane() ^ with) & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
    const int source = simt::lane() + static_cast<int>(by);
    return simt::shuffle(mask, line, value, source < 32 ? source : simt::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
    const int source = simt::lane() - static_cast<int>(by);
    return simt::shuffle(mask, line, value, source >= 0 ? source : simt::lane());
}

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

template <class T>
T atomicAdd(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

static inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
