// What a host of the CUDA runtime does with kernels, for files whose `kernel<<<grid, block, shared, stream>>>(p)` was
// rewritten to `launched(kernel, grid, block, shared, stream)(p)`: no C++ compiler takes the former. A launch is run at
// once. An error is its own text.
#pragma once
#include "cuda_runtime.h"

using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;

namespace simt {

inline cudaError_t last_error = cudaSuccess;

template <class Parameters>
struct HostLaunch {
    void (*kernel)(Parameters);
    dim3 grid, block;
    void operator()(const Parameters& parameters) const {
        struct Call {
            void (*kernel)(Parameters);
            const Parameters& parameters;
        } const call{kernel, parameters};
        const auto body = [](const void* of) {
            const Call& made = *static_cast<const Call*>(of);
            made.kernel(made.parameters);
        };
        if (const char* trouble = run(grid, block, 0, body, &call)) last_error = trouble;
    }
};

}  // namespace simt

template <class Parameters>
simt::HostLaunch<Parameters> launched(void (*kernel)(Parameters), dim3 grid, dim3 block, size_t, cudaStream_t) {
    return {kernel, grid, block};
}

static inline cudaError_t cudaGetLastError() {
    const cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}
static inline const char* cudaGetErrorString(cudaError_t error) { return error; }
