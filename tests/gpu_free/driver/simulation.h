// The simulated CUDA driver: one device whose memory is host memory and whose streams run as late as CUDA's ordering
// rules allow (or at once: SIMULATED_CUDA_ORDER=early), so that a missing wait shows as a wrong result.
//
// memory.cpp    allocations between guard pages, which only work in progress may touch
// streams.cpp   streams, events, and which operation may run next
// graphs.cpp    capture and replay
// modules.cpp   kernels, compiled for the CPU, by name
// calls.cpp     which calls were made, which of them shall fail; what is alive
// api.cpp       the exported cu* functions
#pragma once
#include "abi.h"

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simulation {

extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

void complain(char const* format, ...) __attribute__((format(printf, 1, 2)));

// calls.cpp ---------------------------------------------------------------------------------------------------------
enum class Needs { NOTHING, INITIALISED, CONTEXT };
// What a call must answer at once: an injected failure, an earlier asynchronous one, or that it came too early.
Result enter(char const* call, Needs needs);
void set_initialised();
void*& current_context();                // of the calling thread
std::vector<void*>& current_contexts(); // those below it on the thread's stack
void fail_asynchronously(Result result);
Result asynchronous_failure();
// Whether the next run of an operation of this name shall fail, by injection.
Result operation_failure(char const* operation);
void context_retained(int change);

// memory.cpp --------------------------------------------------------------------------------------------------------
Result allocate_device(DevicePointer* pointer, size_t bytes);
Result free_device(DevicePointer pointer);
Result allocate_pinned(void** pointer, size_t bytes);
Result free_pinned(void* pointer);
bool on_device(DevicePointer pointer, size_t bytes); // inside one allocation
bool is_pinned(void const* pointer, size_t bytes);
size_t device_bytes_in_use();
size_t device_bytes_total();
size_t pinned_bytes_in_use();
// While one of these lives, device memory can be touched. The canaries are checked when the last one ends.
struct DeviceAccess {
    explicit DeviceAccess(char const* operation);
    ~DeviceAccess();
    DeviceAccess(DeviceAccess const&) = delete;
};

// streams.cpp -------------------------------------------------------------------------------------------------------
struct Capture;
struct Event {
    uint64_t recorded = 0, done = 0; // how often; `done` follows as the streams run
    std::shared_ptr<Capture> capture; // of the stream in which it was last recorded
    std::set<size_t> capture_nodes;
};
struct Operation {
    char const* name;
    std::function<Result()> run;
    std::shared_ptr<Event> awaits = nullptr, records = nullptr;
    uint64_t count = 0;  // which record of the event
    uint64_t ticket = 0; // place in the order of all calls
};
struct Stream {
    std::deque<Operation> queue;
    bool non_blocking = false;
    bool destroyed = false; // with work left
    std::shared_ptr<Capture> capture;
    std::set<size_t> frontier; // nodes that the next captured operation follows
};
Stream* find_stream(void* handle); // null when there is none
Result create_stream(void** stream, unsigned flags);
Result destroy_stream(void* stream);
Result enqueue(void* stream, char const* name, std::function<Result()> run);
Result finish_stream(void* stream);
Result finish_device();
Result query_stream(void* stream);
Result create_event(void** event);
Result destroy_event(void* event);
Result record_event(void* event, void* stream);
Result wait_event(void* stream, void* event);
Result query_event(void* event);
Result finish_event(void* event);
size_t live_streams();
size_t live_events();
// Runs one operation on the device. What fails spoils the context.
Result run_operation(char const* name, std::function<Result()> const& run);

// graphs.cpp --------------------------------------------------------------------------------------------------------
struct Node {
    char const* name;
    std::function<Result()> run;
    std::set<size_t> after;
};
struct Capture {
    Stream* origin;
    int mode; // 0 global, 1 thread local, 2 relaxed
    unsigned long thread;
    bool spoiled = false;
    std::vector<Node> nodes = {};
};
Result capture_operation(Stream& stream, char const* name, std::function<Result()> run);
Result begin_capture(void* stream, int mode);
Result end_capture(void* stream, void** graph);
Result capture_status(void* stream, int* status);
// STREAM_CAPTURE_UNSUPPORTED, and the capture is spoiled, where this call is not allowed during it.
Result refuse_while_capturing();
Result spoil(Capture& capture, Result result);
bool capturing_blocking_stream();
Result instantiate(void** executable, void* graph);
Result launch_graph(void* executable, void* stream);
Result destroy_graph(void* graph);
Result destroy_executable(void* executable);
size_t live_graphs();

// modules.cpp -------------------------------------------------------------------------------------------------------
Result load_module(void** module, void const* image);
Result unload_module(void* module);
Result find_function(void** function, void* module, char const* name);
Result function_attribute(int* value, int attribute, void* function);
Result set_function_attribute(void* function, int attribute, int value);
Result launch(void* function, unsigned const grid[3], unsigned const block[3], unsigned shared_bytes, void* stream,
              void** parameters, void** extra);
int capability_major();
int capability_minor();
int shared_bytes_optin();
size_t live_modules();

// Drops everything of each kind, as the end of a process would.
void forget_memory();
void forget_streams();
void forget_graphs();
void forget_modules();

} // namespace simulation
