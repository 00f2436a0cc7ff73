// The kernels and nothing else: what is compiled anew for each mutant.
#include "cuda_fp16.h"

// What a mutant puts in the place of atomicAdd: other threads run between the read and the write.
template <class T>
T plain_add(T* at, T value) {
    const T before = *at;
    simt::yield();
    *at = before + value;
    return before;
}

#include "kernels.cuh"

extern "C" float sigmoid_under_test(float raw) { return parkdet::sigmoid(raw); }
