// Streams and events. An operation runs when somebody waits for it, and then only what has to precede it.
#include "simulation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>

namespace simulation {
namespace {

Stream legacy;
std::map<void*, std::shared_ptr<Stream>> streams;
std::map<void*, std::shared_ptr<Event>> events;
uint64_t tickets = 0;

enum class Order { LATE, EARLY, SHUFFLED };
std::mt19937 dice;

Order order() {
    static Order const chosen = [] {
        char const* const set = getenv("SIMULATED_CUDA_ORDER");
        if (!set || !strcmp(set, "late"))
            return Order::LATE;
        if (!strcmp(set, "early"))
            return Order::EARLY;
        dice.seed(unsigned(strtoul(set, nullptr, 10)));
        return Order::SHUFFLED;
    }();
    return chosen;
}

std::vector<Stream*> all_streams() {
    std::vector<Stream*> all{&legacy};
    for (auto const& [handle, stream] : streams)
        all.push_back(stream.get());
    return all;
}

// The legacy stream and the blocking ones wait for one another in the order of the calls.
Stream* legacy_predecessor(Stream const& stream, uint64_t ticket) {
    if (stream.non_blocking)
        return nullptr;
    for (Stream* other : all_streams()) {
        bool const related = other != &stream && !other->non_blocking && (other == &legacy || &stream == &legacy);
        if (related && !other->queue.empty() && other->queue.front().ticket < ticket)
            return other;
    }
    return nullptr;
}

Stream* recording_stream(Operation const& waiting) {
    for (Stream* stream : all_streams())
        for (auto const& operation : stream->queue)
            if (operation.records == waiting.awaits && operation.count == waiting.count)
                return stream;
    return nullptr;
}

// Brings a stream one operation further, or the stream that this one waits for.
void advance(Stream& stream) {
    Operation const& front = stream.queue.front();
    if (Stream* const before = legacy_predecessor(stream, front.ticket))
        return advance(*before);
    if (front.awaits && front.awaits->done < front.count)
        if (Stream* const before = recording_stream(front))
            return advance(*before);
    Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (operation.run)
        run_operation(operation.name, operation.run);
    if (operation.records)
        operation.records->done = std::max(operation.records->done, operation.count);
}

Result drain(Stream& stream) {
    while (!stream.queue.empty())
        advance(stream);
    for (auto at = streams.begin(); at != streams.end();)
        at = at->second->destroyed && at->second->queue.empty() ? streams.erase(at) : std::next(at);
    return asynchronous_failure();
}

Result push(Stream& stream, Operation operation) {
    operation.ticket = ++tickets;
    stream.queue.push_back(std::move(operation));
    if (order() == Order::EARLY)
        drain(stream);
    if (order() == Order::SHUFFLED)
        for (Stream* other : all_streams())
            if (!other->queue.empty() && dice() % 2)
                advance(*other);
    return SUCCESS;
}

Event* find_event(void* handle) {
    auto const found = events.find(handle);
    return found == events.end() ? nullptr : found->second.get();
}

} // namespace

Result run_operation(char const* name, std::function<Result()> const& run) {
    if (asynchronous_failure() != SUCCESS)
        return asynchronous_failure();
    Result result = operation_failure(name);
    if (result == SUCCESS) {
        DeviceAccess const access(name);
        result = run();
    }
    if (result != SUCCESS)
        fail_asynchronously(result);
    return result;
}

Stream* find_stream(void* handle) {
    if (uintptr_t(handle) <= 2) // null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
        return &legacy;
    auto const found = streams.find(handle);
    return found == streams.end() || found->second->destroyed ? nullptr : found->second.get();
}

Result create_stream(void** stream, unsigned flags) {
    auto made = std::make_shared<Stream>();
    made->non_blocking = flags & STREAM_NON_BLOCKING;
    *stream = made.get();
    streams[*stream] = made;
    return SUCCESS;
}

Result destroy_stream(void* handle) {
    Stream* const stream = find_stream(handle);
    if (!stream || stream == &legacy)
        return INVALID_HANDLE;
    if (stream->queue.empty())
        streams.erase(handle);
    else
        stream->destroyed = true; // what was asked for is still done
    return SUCCESS;
}

Result enqueue(void* handle, char const* name, std::function<Result()> run) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    if (stream->capture)
        return capture_operation(*stream, name, std::move(run));
    if (stream == &legacy && capturing_blocking_stream())
        return STREAM_CAPTURE_IMPLICIT;
    return push(*stream, {name, std::move(run)});
}

Result finish_stream(void* handle) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    if (stream->capture)
        return spoil(*stream->capture, STREAM_CAPTURE_UNSUPPORTED);
    return drain(*stream);
}

Result finish_device() {
    for (Stream* stream : all_streams())
        while (!stream->queue.empty())
            advance(*stream);
    return drain(legacy);
}

Result query_stream(void* handle) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    if (stream->capture)
        return spoil(*stream->capture, STREAM_CAPTURE_UNSUPPORTED);
    if (stream->queue.empty())
        return asynchronous_failure();
    advance(*stream); // who asks again and again sees it end
    return NOT_READY;
}

Result create_event(void** event) {
    auto made = std::make_shared<Event>();
    *event = made.get();
    events[*event] = made;
    return SUCCESS;
}

Result destroy_event(void* handle) { return events.erase(handle) ? SUCCESS : INVALID_HANDLE; }

Result record_event(void* handle, void* stream_handle) {
    Event* const event = find_event(handle);
    Stream* const stream = find_stream(stream_handle);
    if (!event || !stream)
        return INVALID_HANDLE;
    event->capture = stream->capture;
    if (stream->capture) {
        event->capture_nodes = stream->frontier;
        return SUCCESS;
    }
    Operation operation{"event", nullptr};
    operation.records = events[handle];
    operation.count = ++event->recorded;
    return push(*stream, std::move(operation));
}

Result wait_event(void* stream_handle, void* handle) {
    Event* const event = find_event(handle);
    Stream* const stream = find_stream(stream_handle);
    if (!event || !stream)
        return INVALID_HANDLE;
    if (event->capture) { // the waiting stream joins that capture
        if (stream->capture && stream->capture != event->capture)
            return spoil(*stream->capture, STREAM_CAPTURE_ISOLATION);
        stream->capture = event->capture;
        stream->frontier.insert(event->capture_nodes.begin(), event->capture_nodes.end());
        return SUCCESS;
    }
    if (stream->capture)
        return spoil(*stream->capture, STREAM_CAPTURE_ISOLATION);
    if (!event->recorded)
        return SUCCESS;
    Operation operation{"wait", nullptr};
    operation.awaits = events[handle];
    operation.count = event->recorded;
    return push(*stream, std::move(operation));
}

Result query_event(void* handle) {
    Event* const event = find_event(handle);
    if (!event)
        return INVALID_HANDLE;
    if (event->done >= event->recorded)
        return asynchronous_failure();
    Operation asked{"query", nullptr};
    asked.awaits = events[handle];
    asked.count = event->recorded;
    if (Stream* const stream = recording_stream(asked))
        advance(*stream);
    return NOT_READY;
}

Result finish_event(void* handle) {
    Event* const event = find_event(handle);
    if (!event)
        return INVALID_HANDLE;
    if (event->capture)
        return spoil(*event->capture, STREAM_CAPTURE_UNSUPPORTED);
    Operation awaited{"wait", nullptr};
    awaited.awaits = events[handle];
    awaited.count = event->recorded;
    while (event->done < awaited.count)
        if (Stream* const stream = recording_stream(awaited))
            advance(*stream);
        else
            break;
    return asynchronous_failure();
}

size_t live_streams() {
    return size_t(std::count_if(streams.begin(), streams.end(), [](auto const& entry) { return !entry.second->destroyed; }));
}
size_t live_events() { return events.size(); }

void forget_streams() {
    legacy = Stream{};
    streams.clear();
    events.clear();
}

} // namespace simulation
