// The launches of the plugin on a GPU.
#include <cuda_runtime.h>

#include <cstring>

#include "../kernels.cuh"
#include "nms_core.h"

namespace parkdet {

const char* launch_nms(const NmsParameters& parameters, void* stream) {
    cudaStream_t const into = static_cast<cudaStream_t>(stream);
    NmsParameters p = parameters;
    const char* trouble = nullptr;
    for_each_launch(p, [&](const Launch& launch) {
        const dim3 grid(launch.grid_x, launch.grid_y);
        p.round = launch.round;
        if (trouble) return;
        if (!std::strcmp(launch.entry, "parkdet_reset")) parkdet_reset<<<grid, launch.threads, 0, into>>>(p);
        else if (!std::strcmp(launch.entry, "parkdet_collect")) parkdet_collect<<<grid, launch.threads, 0, into>>>(p);
        else if (!std::strcmp(launch.entry, "parkdet_select")) parkdet_select<<<grid, launch.threads, 0, into>>>(p);
        else if (!std::strcmp(launch.entry, "parkdet_sort")) parkdet_sort<<<grid, launch.threads, 0, into>>>(p);
        else if (!std::strcmp(launch.entry, "parkdet_rank")) parkdet_rank<<<grid, launch.threads, 0, into>>>(p);
        else if (!std::strcmp(launch.entry, "parkdet_suppress")) parkdet_suppress<<<grid, launch.threads, 0, into>>>(p);
        else trouble = "plan.h names a kernel that launch.cu does not know";
        const cudaError_t status = cudaGetLastError();
        if (!trouble && status != cudaSuccess) trouble = cudaGetErrorString(status);
    });
    return trouble;
}

}  // namespace parkdet
