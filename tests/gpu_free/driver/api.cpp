// The functions that a program finds in libcuda.so.1. Each counts its call, refuses what comes too early, checks its
// pointers and hands on.
#include "simulation.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>

using namespace simulation;

// ENTER(cuMemAlloc, CONTEXT): the lock, and an answer at once where there is one.
#define ENTER(call, needs)                                                                                             \
    Lock const lock(simulation::mutex);                                                                                \
    if (Result const early = enter(#call, Needs::needs); early != SUCCESS)                                             \
    return early
#define NOT_WHILE_CAPTURING()                                                                                          \
    if (Result const refused = refuse_while_capturing(); refused != SUCCESS)                                           \
    return refused
#define ON_DEVICE(pointer, bytes)                                                                                      \
    if (!on_device(pointer, bytes)) {                                                                                  \
        complain("%s: %zu bytes at %#llx are not inside one allocation", __func__, size_t(bytes), pointer);            \
        return INVALID_VALUE;                                                                                          \
    }

namespace {
int the_context;
void* host(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }
} // namespace

// The device --------------------------------------------------------------------------------------------------------

EXPORT Result cuInit(unsigned flags) {
    ENTER(cuInit, NOTHING);
    if (flags)
        return INVALID_VALUE;
    set_initialised();
    return SUCCESS;
}
EXPORT Result cuDriverGetVersion(int* version) {
    ENTER(cuDriverGetVersion, NOTHING);
    *version = 13000;
    return SUCCESS;
}
EXPORT Result cuDeviceGetCount(int* count) {
    ENTER(cuDeviceGetCount, INITIALISED);
    *count = 1;
    return SUCCESS;
}
EXPORT Result cuDeviceGet(Device* device, int ordinal) {
    ENTER(cuDeviceGet, INITIALISED);
    if (ordinal != 0)
        return INVALID_DEVICE;
    *device = 0;
    return SUCCESS;
}
EXPORT Result cuDeviceGetName(char* name, int length, Device) {
    ENTER(cuDeviceGetName, INITIALISED);
    snprintf(name, size_t(length), "simulated device");
    return SUCCESS;
}
EXPORT Result cuDeviceGetUuid_v2(Uuid* uuid, Device) {
    ENTER(cuDeviceGetUuid, INITIALISED);
    memset(uuid, 7, sizeof *uuid);
    return SUCCESS;
}
EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, Device) {
    ENTER(cuDeviceTotalMem, INITIALISED);
    *bytes = device_bytes_total();
    return SUCCESS;
}
EXPORT Result cuDeviceComputeCapability(int* major, int* minor, Device) {
    ENTER(cuDeviceComputeCapability, INITIALISED);
    *major = capability_major();
    *minor = capability_minor();
    return SUCCESS;
}
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, Device) {
    ENTER(cuDeviceGetAttribute, INITIALISED);
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_bytes_optin(); break;
    case WARP_SIZE: *value = 32; break;
    case CLOCK_RATE: *value = 1590000; break;
    case MEMORY_CLOCK_RATE: *value = 5001000; break;
    case GLOBAL_MEMORY_BUS_WIDTH: *value = 256; break;
    case MULTIPROCESSOR_COUNT: *value = 40; break;
    case UNIFIED_ADDRESSING: *value = 1; break;
    case COMPUTE_CAPABILITY_MAJOR: *value = capability_major(); break;
    case COMPUTE_CAPABILITY_MINOR: *value = capability_minor(); break;
    default: *value = 0;
    }
    return SUCCESS;
}

// Contexts: one, however it is named ----------------------------------------------------------------------------------

EXPORT Result cuDevicePrimaryCtxRetain(void** context, Device) {
    ENTER(cuDevicePrimaryCtxRetain, INITIALISED);
    context_retained(1);
    *context = &the_context;
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRelease_v2(Device) {
    ENTER(cuDevicePrimaryCtxRelease, INITIALISED);
    finish_device();
    context_retained(-1);
    return SUCCESS;
}
EXPORT Result cuCtxCreate_v4(void** context, void*, unsigned, Device) {
    ENTER(cuCtxCreate, INITIALISED);
    context_retained(1);
    *context = current_context() = &the_context;
    return SUCCESS;
}
EXPORT Result cuCtxCreate_v2(void** context, unsigned flags, Device device) {
    return cuCtxCreate_v4(context, nullptr, flags, device);
}
EXPORT Result cuCtxDestroy_v2(void*) {
    ENTER(cuCtxDestroy, INITIALISED);
    finish_device();
    context_retained(-1);
    current_context() = nullptr;
    return SUCCESS;
}
EXPORT Result cuCtxAttach(void** context, unsigned) {
    ENTER(cuCtxAttach, CONTEXT);
    *context = current_context();
    return SUCCESS;
}
EXPORT Result cuCtxDetach(void*) {
    ENTER(cuCtxDetach, INITIALISED);
    return SUCCESS;
}
EXPORT Result cuCtxSetCurrent(void* context) {
    ENTER(cuCtxSetCurrent, INITIALISED);
    current_context() = context;
    return SUCCESS;
}
EXPORT Result cuCtxGetCurrent(void** context) {
    ENTER(cuCtxGetCurrent, INITIALISED);
    *context = current_context();
    return SUCCESS;
}
EXPORT Result cuCtxPushCurrent_v2(void* context) {
    ENTER(cuCtxPushCurrent, INITIALISED);
    if (context != &the_context)
        return INVALID_CONTEXT;
    current_contexts().push_back(current_context());
    current_context() = context;
    return SUCCESS;
}
EXPORT Result cuCtxPopCurrent_v2(void** context) {
    ENTER(cuCtxPopCurrent, INITIALISED);
    if (!current_context())
        return INVALID_CONTEXT;
    if (context)
        *context = current_context();
    auto& below = current_contexts();
    current_context() = below.empty() ? nullptr : below.back();
    if (!below.empty())
        below.pop_back();
    return SUCCESS;
}
EXPORT Result cuCtxGetDevice(Device* device) {
    ENTER(cuCtxGetDevice, CONTEXT);
    *device = 0;
    return SUCCESS;
}
EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(cuCtxGetStreamPriorityRange, CONTEXT);
    *least = *greatest = 0;
    return SUCCESS;
}
EXPORT Result cuCtxSynchronize() {
    ENTER(cuCtxSynchronize, CONTEXT);
    NOT_WHILE_CAPTURING();
    return finish_device();
}

// Memory ------------------------------------------------------------------------------------------------------------

EXPORT Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    ENTER(cuMemGetInfo, CONTEXT);
    *total = device_bytes_total();
    *free_bytes = *total - device_bytes_in_use();
    return SUCCESS;
}
EXPORT Result cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
    ENTER(cuMemAlloc, CONTEXT);
    NOT_WHILE_CAPTURING();
    return allocate_device(pointer, bytes);
}
EXPORT Result cuMemFree_v2(DevicePointer pointer) {
    ENTER(cuMemFree, CONTEXT);
    NOT_WHILE_CAPTURING();
    return free_device(pointer);
}
EXPORT Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    ENTER(cuMemHostAlloc, CONTEXT);
    NOT_WHILE_CAPTURING();
    return allocate_pinned(pointer, bytes);
}
EXPORT Result cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
EXPORT Result cuMemFreeHost(void* pointer) {
    ENTER(cuMemFreeHost, CONTEXT);
    NOT_WHILE_CAPTURING();
    return free_pinned(pointer);
}
EXPORT Result cuPointerGetAttribute(void* value, int attribute, DevicePointer pointer) {
    ENTER(cuPointerGetAttribute, CONTEXT);
    bool const device = on_device(pointer, 1);
    if (attribute != POINTER_MEMORY_TYPE || (!device && !is_pinned(host(pointer), 1)))
        return INVALID_VALUE;
    *static_cast<unsigned*>(value) = device ? MEMORY_DEVICE : MEMORY_HOST;
    return SUCCESS;
}

namespace {
Result copy_to_device(void* stream, DevicePointer to, void const* from, size_t bytes) {
    if (is_pinned(from, bytes))
        return enqueue(stream, "copy", [=] { memcpy(host(to), from, bytes); return SUCCESS; });
    // Pageable memory is staged before the call returns.
    std::string const staged(static_cast<char const*>(from), bytes);
    return enqueue(stream, "copy", [=] { memcpy(host(to), staged.data(), bytes); return SUCCESS; });
}
Result copy_to_host(void* stream, void* to, DevicePointer from, size_t bytes) {
    Result const result = enqueue(stream, "copy", [=] { memcpy(to, host(from), bytes); return SUCCESS; });
    return result == SUCCESS && !is_pinned(to, bytes) ? finish_stream(stream) : result;
}
} // namespace

EXPORT Result cuMemcpyHtoDAsync_v2(DevicePointer to, void const* from, size_t bytes, void* stream) {
    ENTER(cuMemcpyHtoDAsync, CONTEXT);
    ON_DEVICE(to, bytes);
    return copy_to_device(stream, to, from, bytes);
}
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
    ENTER(cuMemcpyDtoHAsync, CONTEXT);
    ON_DEVICE(from, bytes);
    return copy_to_host(stream, to, from, bytes);
}
EXPORT Result cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
    ENTER(cuMemcpyDtoDAsync, CONTEXT);
    ON_DEVICE(to, bytes);
    ON_DEVICE(from, bytes);
    return enqueue(stream, "copy", [=] { memmove(host(to), host(from), bytes); return SUCCESS; });
}
EXPORT Result cuMemcpyHtoD_v2(DevicePointer to, void const* from, size_t bytes) {
    ENTER(cuMemcpyHtoD, CONTEXT);
    ON_DEVICE(to, bytes);
    Result const result = copy_to_device(nullptr, to, from, bytes);
    return result == SUCCESS ? finish_stream(nullptr) : result;
}
EXPORT Result cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
    ENTER(cuMemcpyDtoH, CONTEXT);
    ON_DEVICE(from, bytes);
    Result const result = copy_to_host(nullptr, to, from, bytes);
    return result == SUCCESS ? finish_stream(nullptr) : result;
}
EXPORT Result cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, void* stream) {
    ENTER(cuMemsetD8Async, CONTEXT);
    ON_DEVICE(to, bytes);
    return enqueue(stream, "set", [=] { memset(host(to), value, bytes); return SUCCESS; });
}
EXPORT Result cuMemsetD32Async(DevicePointer to, unsigned value, size_t count, void* stream) {
    ENTER(cuMemsetD32Async, CONTEXT);
    ON_DEVICE(to, 4 * count);
    return enqueue(stream, "set", [=] {
        for (size_t i = 0; i < count; i++)
            static_cast<unsigned*>(host(to))[i] = value;
        return SUCCESS;
    });
}

// Streams and events ------------------------------------------------------------------------------------------------

EXPORT Result cuStreamCreate(void** stream, unsigned flags) {
    ENTER(cuStreamCreate, CONTEXT);
    return create_stream(stream, flags);
}
EXPORT Result cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    ENTER(cuStreamCreateWithPriority, CONTEXT);
    return create_stream(stream, flags);
}
EXPORT Result cuStreamDestroy_v2(void* stream) {
    ENTER(cuStreamDestroy, CONTEXT);
    return destroy_stream(stream);
}
EXPORT Result cuStreamSynchronize(void* stream) {
    ENTER(cuStreamSynchronize, CONTEXT);
    return finish_stream(stream);
}
EXPORT Result cuStreamQuery(void* stream) {
    ENTER(cuStreamQuery, CONTEXT);
    return query_stream(stream);
}
EXPORT Result cuStreamWaitEvent(void* stream, void* event, unsigned) {
    ENTER(cuStreamWaitEvent, CONTEXT);
    return wait_event(stream, event);
}
EXPORT Result cuStreamGetCtx(void*, void** context) {
    ENTER(cuStreamGetCtx, CONTEXT);
    *context = &the_context;
    return SUCCESS;
}
EXPORT Result cuLaunchHostFunc(void* stream, HostFunction function, void* argument) {
    ENTER(cuLaunchHostFunc, CONTEXT);
    return enqueue(stream, "host", [=] { function(argument); return SUCCESS; });
}
EXPORT Result cuEventCreate(void** event, unsigned) {
    ENTER(cuEventCreate, CONTEXT);
    return create_event(event);
}
EXPORT Result cuEventDestroy_v2(void* event) {
    ENTER(cuEventDestroy, CONTEXT);
    return destroy_event(event);
}
EXPORT Result cuEventRecord(void* event, void* stream) {
    ENTER(cuEventRecord, CONTEXT);
    return record_event(event, stream);
}
EXPORT Result cuEventQuery(void* event) {
    ENTER(cuEventQuery, CONTEXT);
    return query_event(event);
}
EXPORT Result cuEventSynchronize(void* event) {
    ENTER(cuEventSynchronize, CONTEXT);
    return finish_event(event);
}
EXPORT Result cuEventElapsedTime_v2(float* milliseconds, void*, void*) {
    ENTER(cuEventElapsedTime, CONTEXT);
    *milliseconds = 1; // nothing here takes a device's time
    return SUCCESS;
}
EXPORT Result cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

// Graphs ------------------------------------------------------------------------------------------------------------

EXPORT Result cuStreamBeginCapture_v2(void* stream, int mode) {
    ENTER(cuStreamBeginCapture, CONTEXT);
    return begin_capture(stream, mode);
}
EXPORT Result cuStreamEndCapture(void* stream, void** graph) {
    Lock const lock(simulation::mutex);
    Result const early = enter("cuStreamEndCapture", Needs::CONTEXT);
    Result const result = end_capture(stream, graph); // whatever the answer, the capture is over
    if (early != SUCCESS && result == SUCCESS)
        destroy_graph(*graph);
    return early != SUCCESS ? early : result;
}
EXPORT Result cuStreamIsCapturing(void* stream, int* status) {
    ENTER(cuStreamIsCapturing, CONTEXT);
    return capture_status(stream, status);
}
EXPORT Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    ENTER(cuGraphInstantiate, CONTEXT);
    return instantiate(executable, graph);
}
EXPORT Result cuGraphLaunch(void* executable, void* stream) {
    ENTER(cuGraphLaunch, CONTEXT);
    return launch_graph(executable, stream);
}
EXPORT Result cuGraphDestroy(void* graph) {
    ENTER(cuGraphDestroy, CONTEXT);
    return destroy_graph(graph);
}
EXPORT Result cuGraphExecDestroy(void* executable) {
    ENTER(cuGraphExecDestroy, CONTEXT);
    return destroy_executable(executable);
}

// Modules and launches ----------------------------------------------------------------------------------------------

EXPORT Result cuModuleLoadData(void** module, void const* image) {
    ENTER(cuModuleLoadData, CONTEXT);
    NOT_WHILE_CAPTURING();
    return load_module(module, image);
}
EXPORT Result cuModuleLoadDataEx(void** module, void const* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
EXPORT Result cuModuleLoadFatBinary(void** module, void const* image) { return cuModuleLoadData(module, image); }
EXPORT Result cuModuleUnload(void* module) {
    ENTER(cuModuleUnload, CONTEXT);
    return unload_module(module);
}
EXPORT Result cuModuleGetFunction(void** function, void* module, char const* name) {
    ENTER(cuModuleGetFunction, CONTEXT);
    return find_function(function, module, name);
}
EXPORT Result cuFuncGetAttribute(int* value, int attribute, void* function) {
    ENTER(cuFuncGetAttribute, CONTEXT);
    return function_attribute(value, attribute, function);
}
EXPORT Result cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER(cuFuncSetAttribute, CONTEXT);
    return set_function_attribute(function, attribute, value);
}
EXPORT Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                             unsigned bz, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    ENTER(cuLaunchKernel, CONTEXT);
    unsigned const grid[]{gx, gy, gz}, block[]{bx, by, bz};
    return launch(function, grid, block, shared_bytes, stream, parameters, extra);
}
EXPORT Result cuLaunchKernelEx(LaunchConfig const* config, void* function, void** parameters, void** extra) {
    ENTER(cuLaunchKernel, CONTEXT);
    return launch(function, config->grid, config->block, config->shared_bytes, config->stream, parameters, extra);
}

// Errors and look-up ------------------------------------------------------------------------------------------------

EXPORT Result cuGetErrorName(Result, char const** text) {
    *text = "CUDA_ERROR";
    return SUCCESS;
}
EXPORT Result cuGetErrorString(Result, char const** text) {
    *text = "an error of the simulated driver";
    return SUCCESS;
}
EXPORT Result cuGetProcAddress_v2(char const* name, void** function, int, uint64_t, int* found) {
    static void* const self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = nullptr;
    for (char const* suffix : {"_v4", "_v2", "", "WithFlags"})
        if ((*function = dlsym(self, (std::string(name) + suffix).c_str())))
            break;
    if (found)
        *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
