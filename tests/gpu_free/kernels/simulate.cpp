// The kernels on the CPU behind a C interface: launches as the driver API makes them, and the plan of plan.h, for
// Python to compare with its own.
#include "cuda_runtime.h"

#include "kernels.cuh"
#include "plan.h"

namespace {

template <class Parameters, void (*kernel)(Parameters)>
void call(const void* parameters) {
    kernel(*static_cast<const Parameters*>(parameters));
}

struct Entry {
    const char* name;
    void (*body)(const void*);
    size_t parameter_bytes;
};

template <void (*kernel)(parkdet::NmsParameters)>
constexpr Entry nms(const char* name) {
    return {name, call<parkdet::NmsParameters, kernel>, sizeof(parkdet::NmsParameters)};
}

constexpr Entry kEntries[] = {
    nms<parkdet_reset>("parkdet_reset"),
    nms<parkdet_collect>("parkdet_collect"),
    nms<parkdet_select>("parkdet_select"),
    nms<parkdet_sort>("parkdet_sort"),
    nms<parkdet_rank>("parkdet_rank"),
    nms<parkdet_suppress>("parkdet_suppress"),
    {"parkdet_letterbox", call<parkdet::LetterboxParameters, parkdet_letterbox>, sizeof(parkdet::LetterboxParameters)},
};

const Entry* find(const char* name) {
    for (const Entry& entry : kEntries)
        if (!strcmp(entry.name, name)) return &entry;
    return nullptr;
}

}  // namespace

extern "C" {

// Bytes of an entry's parameter, or 0 where there is no such entry.
size_t simulated_parameter_bytes(const char* entry) {
    const Entry* found = find(entry);
    return found ? found->parameter_bytes : 0;
}

// One launch, run to its end. Null, or what went wrong. `schedule` is that of simt::run.
const char* simulate_launch(const char* entry, const unsigned grid[3], const unsigned block[3], const void* parameters,
                            unsigned schedule) {
    const Entry* found = find(entry);
    if (!found) return "there is no kernel of this name";
    return simt::run(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), schedule, found->body,
                     parameters);
}

struct PlannedLaunch {
    char entry[32];
    unsigned grid_x, grid_y, threads;
    int round;
};

static PlannedLaunch written_down(const parkdet::Launch& launch) {
    PlannedLaunch planned{{}, launch.grid_x, launch.grid_y, launch.threads, launch.round};
    strncpy(planned.entry, launch.entry, sizeof planned.entry - 1);
    return planned;
}

// The plan of plan.h, step by step.
int planned_head(parkdet::NmsParameters* p, int anchors, int rows, int columns, float stride, float view_scale,
                 int view_flip, const float* anchor_wh) {
    return parkdet::add_head(*p, anchors, rows, columns, stride, view_scale, view_flip, anchor_wh);
}

size_t planned_workspace(parkdet::NmsParameters* p, uint64_t address) {
    p->logit_floor = parkdet::logit_floor(p->conf);
    parkdet::bind_workspace(*p, reinterpret_cast<void*>(address));
    return parkdet::workspace_bytes(static_cast<size_t>(p->batch), static_cast<size_t>(p->max_candidates));
}

int planned_launches(const parkdet::NmsParameters* p, PlannedLaunch* launches) {
    int count = 0;
    parkdet::for_each_launch(*p, [&](const parkdet::Launch& launch) { launches[count++] = written_down(launch); });
    return count;
}

void planned_letterbox(const parkdet::LetterboxParameters* p, PlannedLaunch* launch) {
    *launch = written_down(parkdet::letterbox_launch(*p));
}

float simulated_half(uint16_t bits) { return __half2float(__half{bits}); }

float simulated_sigmoid(float raw) { return parkdet::sigmoid(raw); }

}  // extern "C"
