// Every call by name and number: counted, made to fail on request, refused before its time.
#include "simulation.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simulation {

std::recursive_mutex mutex;

namespace {
bool initialised = false;
thread_local void* context = nullptr;
thread_local std::vector<void*> contexts_below;
int contexts = 0;
Result asynchronous = SUCCESS;
struct Injected {
    std::string call;
    long number;
    Result result;
};
std::vector<Injected> injected;
std::map<std::string, long> counts;
std::string log_of_calls;

Result injected_failure(std::string const& name) {
    long const number = ++counts[name];
    log_of_calls += name + "\n";
    for (auto const& failure : injected)
        if (failure.call == name && (failure.number == number || failure.number == 0))
            return failure.result;
    return SUCCESS;
}
} // namespace

void complain(char const* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("simulated CUDA: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

Result enter(char const* call, Needs needs) {
    if (Result const failure = injected_failure(call); failure != SUCCESS)
        return failure;
    if (needs != Needs::NOTHING && !initialised)
        return NOT_INITIALIZED;
    if (needs == Needs::CONTEXT && !context)
        return INVALID_CONTEXT;
    // What failed on the device spoils the context for good: every later call says so, but for those that give back.
    bool const gives_back = strstr(call, "Free") || strstr(call, "Destroy") || strstr(call, "Unload") ||
                            strstr(call, "Release") || strstr(call, "Pop");
    return needs == Needs::CONTEXT && !gives_back ? asynchronous : SUCCESS;
}

void set_initialised() { initialised = true; }
void*& current_context() { return context; }
std::vector<void*>& current_contexts() { return contexts_below; }
void fail_asynchronously(Result result) {
    if (asynchronous == SUCCESS)
        asynchronous = result;
}
Result asynchronous_failure() { return asynchronous; }
Result operation_failure(char const* operation) { return injected_failure(std::string("run:") + operation); }
void context_retained(int change) {
    contexts += change;
    if (contexts == 0)
        asynchronous = SUCCESS;
}

} // namespace simulation

using namespace simulation;

// The test's own calls ----------------------------------------------------------------------------------------------

// From now on call number `number` (from 1; 0 for every one) of this name answers `result`. Operations on the device
// are called `run:kernel`, `run:copy`, `run:host`, ... and fail when they run.
EXPORT void simulated_fail(char const* call, long number, int result) {
    Lock lock(mutex);
    injected.push_back({call, number, Result(result)});
}
EXPORT void simulated_reset() {
    Lock lock(mutex);
    injected.clear();
    counts.clear();
    log_of_calls.clear();
    asynchronous = SUCCESS;
}
// Drops what is alive, after a test in which giving it back was made to fail.
EXPORT void simulated_forget() {
    Lock lock(mutex);
    forget_streams();
    forget_graphs();
    forget_modules();
    forget_memory();
    contexts = 0;
    context = nullptr;
    contexts_below.clear();
}
// The names of all calls since the last reset, one a line, in order.
EXPORT char const* simulated_calls() { return log_of_calls.c_str(); }
EXPORT size_t simulated_live(char const* kind) {
    Lock lock(mutex);
    std::map<std::string, size_t> const live{
        {"device bytes", device_bytes_in_use()}, {"pinned bytes", pinned_bytes_in_use()},
        {"streams", live_streams()},             {"events", live_events()},
        {"modules", live_modules()},             {"graphs", live_graphs()},
        {"contexts", size_t(contexts)},
    };
    auto const found = live.find(kind);
    return found == live.end() ? size_t(-1) : found->second;
}
