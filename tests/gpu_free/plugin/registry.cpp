// The part of libnvinfer that a library which registers itself needs: a registry that remembers what it was given.
#include <NvInferRuntime.h>

#include <cstring>

using namespace nvinfer1;

namespace {

int registered = 0;

class Registry final : public IPluginRegistry {
public:
#if NV_TENSORRT_MAJOR < 11 // creators of plugins before version 3
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const,
                                     AsciiChar const* const) noexcept override {
        return nullptr;
    }
#endif
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool const) override {}
    void* loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
    void deregisterLibrary(void*) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const space) noexcept override {
        registered += !strcmp(space, "parkdet") && !strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE");
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
        *count = 0;
        return nullptr;
    }
    IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                        AsciiChar const* const) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return --registered, true; }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const count) noexcept override {
        *count = 0;
        return nullptr;
    }
    ~Registry() noexcept override = default;
} registry;

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
EXPORT int creators_registered() { return registered; }
