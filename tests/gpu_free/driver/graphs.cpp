// Stream capture and graphs. A replay runs the nodes in an order that the captured edges allow, the last captured
// first, so that an edge that is missing shows.
#include "simulation.h"

#include <functional>
#include <thread>

namespace simulation {
namespace {

struct Graph {
    std::vector<Node> nodes;
};
std::map<void*, std::shared_ptr<Graph>> graphs, executables;
std::set<std::shared_ptr<Capture>> captures;
std::map<Capture*, std::set<Stream*>> members;

unsigned long this_thread() { return std::hash<std::thread::id>{}(std::this_thread::get_id()); }

Result replay(Graph const& graph) {
    std::set<size_t> done;
    while (done.size() < graph.nodes.size())
        for (size_t i = graph.nodes.size(); i-- > 0;) {
            Node const& node = graph.nodes[i];
            bool ready = !done.count(i);
            for (size_t before : node.after)
                ready &= done.count(before) > 0;
            if (!ready)
                continue;
            if (Result const result = run_operation(node.name, node.run); result != SUCCESS)
                return result;
            done.insert(i);
            break;
        }
    return SUCCESS;
}

// Whether everything that was captured precedes what the origin stream does next.
bool joined(Capture const& capture) {
    std::set<size_t> reached;
    std::vector<size_t> open(capture.origin->frontier.begin(), capture.origin->frontier.end());
    while (!open.empty()) {
        size_t const node = open.back();
        open.pop_back();
        if (reached.insert(node).second)
            open.insert(open.end(), capture.nodes[node].after.begin(), capture.nodes[node].after.end());
    }
    return reached.size() == capture.nodes.size();
}

} // namespace

Result spoil(Capture& capture, Result result) {
    capture.spoiled = true;
    return result;
}

bool capturing_blocking_stream() {
    for (auto const& capture : captures)
        if (!capture->origin->non_blocking)
            return true;
    return false;
}

Result refuse_while_capturing() {
    for (auto const& capture : captures)
        if (capture->mode == 0 || (capture->mode == 1 && capture->thread == this_thread()))
            return spoil(*capture, STREAM_CAPTURE_UNSUPPORTED);
    return SUCCESS;
}

Result capture_operation(Stream& stream, char const* name, std::function<Result()> run) {
    if (stream.capture->spoiled)
        return STREAM_CAPTURE_INVALIDATED;
    members[stream.capture.get()].insert(&stream);
    stream.capture->nodes.push_back({name, std::move(run), stream.frontier});
    stream.frontier = {stream.capture->nodes.size() - 1};
    return SUCCESS;
}

Result begin_capture(void* handle, int mode) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    if (uintptr_t(handle) <= 2)
        return STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture)
        return spoil(*stream->capture, STREAM_CAPTURE_UNSUPPORTED);
    stream->capture = std::make_shared<Capture>(Capture{stream, mode, this_thread()});
    stream->frontier.clear();
    captures.insert(stream->capture);
    members[stream->capture.get()] = {stream};
    return SUCCESS;
}

Result end_capture(void* handle, void** graph) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    auto const capture = stream->capture;
    if (!capture || capture->origin != stream)
        return INVALID_VALUE;
    bool const complete = joined(*capture);
    for (Stream* member : members[capture.get()])
        if (member->capture == capture) {
            member->capture = nullptr;
            member->frontier.clear();
        }
    members.erase(capture.get());
    captures.erase(capture);
    if (capture->spoiled)
        return STREAM_CAPTURE_INVALIDATED;
    if (!complete)
        return STREAM_CAPTURE_UNJOINED;
    auto made = std::make_shared<Graph>(Graph{capture->nodes});
    *graph = made.get();
    graphs[*graph] = made;
    return SUCCESS;
}

Result capture_status(void* handle, int* status) {
    Stream* const stream = find_stream(handle);
    if (!stream)
        return INVALID_HANDLE;
    *status = !stream->capture ? CAPTURE_NONE : stream->capture->spoiled ? CAPTURE_INVALIDATED : CAPTURE_ACTIVE;
    return SUCCESS;
}

Result instantiate(void** executable, void* graph) {
    auto const found = graphs.find(graph);
    if (found == graphs.end())
        return INVALID_HANDLE;
    auto made = std::make_shared<Graph>(*found->second);
    *executable = made.get();
    executables[*executable] = made;
    return SUCCESS;
}

Result launch_graph(void* executable, void* stream) {
    auto const found = executables.find(executable);
    if (found == executables.end())
        return INVALID_HANDLE;
    auto const graph = found->second;
    return enqueue(stream, "graph", [graph] { return replay(*graph); });
}

Result destroy_graph(void* graph) { return graphs.erase(graph) ? SUCCESS : INVALID_HANDLE; }
Result destroy_executable(void* executable) { return executables.erase(executable) ? SUCCESS : INVALID_HANDLE; }
void forget_graphs() {
    graphs.clear();
    executables.clear();
    captures.clear();
    members.clear();
}
size_t live_graphs() { return graphs.size() + executables.size(); }

} // namespace simulation
