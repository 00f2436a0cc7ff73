// The launches of the plugin on the CPU: the kernels compiled with the shim, run at once.
#include "cuda_runtime.h"

#include "kernels.cuh"
#include "plugin/nms_core.h"

namespace {

template <void (*kernel)(parkdet::NmsParameters)>
void call(const void* parameters) {
    kernel(*static_cast<const parkdet::NmsParameters*>(parameters));
}

}  // namespace

namespace parkdet {

const char* launch_nms(const NmsParameters& parameters, void*) {
    struct Entry {
        const char* name;
        void (*body)(const void*);
    };
    static const Entry entries[] = {
        {"parkdet_reset", call<parkdet_reset>},   {"parkdet_collect", call<parkdet_collect>},
        {"parkdet_select", call<parkdet_select>}, {"parkdet_sort", call<parkdet_sort>},
        {"parkdet_rank", call<parkdet_rank>},     {"parkdet_suppress", call<parkdet_suppress>},
    };
    NmsParameters p = parameters;
    const char* trouble = nullptr;
    for_each_launch(p, [&](const Launch& launch) {
        p.round = launch.round;
        for (const Entry& entry : entries)
            if (!trouble && !strcmp(entry.name, launch.entry))
                trouble = simt::run(dim3(launch.grid_x, launch.grid_y), dim3(launch.threads), 0, entry.body, &p);
    });
    return trouble;
}

}  // namespace parkdet
