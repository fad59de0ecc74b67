#include "kernels/device_hooks.hpp"

#include <cuda_runtime.h>

#include <map>

#include "core/error.hpp"

namespace kv {
namespace {

std::map<std::string, std::function<HookOutputs(const HookInputs&)>>& runs() {
  static std::map<std::string, std::function<HookOutputs(const HookInputs&)>> all;  // built on first use, before main
  return all;
}

}  // namespace

HookOutputs run_hooks_on_device(const std::string& name, const HookInputs& inputs) {
  const auto run = runs().find(name);
  if (run == runs().end()) throw ConfigError("policy: '" + name + "' was not compiled for the device");
  return run->second(inputs);
}

bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

bool register_device_hooks(const char* name, std::function<HookOutputs(const HookInputs&)> run) {
  return runs().emplace(name, std::move(run)).second;
}

}  // namespace kv
