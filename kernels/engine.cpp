// Points of a trace over devices.
#include "kernels/engine.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <thread>

#include "kernels/device_program.hpp"
#include "kernels/device_run.hpp"

namespace kv {
namespace {

std::map<std::string, MakeDeviceProgram>& programs() {
  static std::map<std::string, MakeDeviceProgram> all;  // built on first use: registrars run before main in any order
  return all;
}

/// A device's thread: whatever goes wrong becomes the error of every point that has no outcome yet.
void work(int device, SharedSession& session, const std::vector<DealtPoint>& points, const DeviceOptions& options,
          Outbox& outbox, double& busy) {
  try {
    KV_CUDA_TRY(cudaSetDevice(device));
    busy = replay_on_current_device(session, points, options, outbox);
  } catch (const std::exception&) {
    for (const DealtPoint& point : points) outbox.put(point.index, {{}, std::current_exception(), nullptr, 0});
  }
  outbox.worker_ended();
}

}  // namespace

std::unique_ptr<DeviceProgram> make_device_program(const std::string& name,
                                                   std::span<const BoundPolicy* const> points) {
  const auto make = programs().find(name);
  if (make == programs().end()) throw ConfigError("policy: '" + name + "' was not compiled for the device");
  return make->second(points);
}

bool register_device_program(const char* name, MakeDeviceProgram make) {
  return programs().emplace(name, std::move(make)).second;
}

std::vector<DeviceInfo> devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<DeviceInfo> all;
  for (int d = 0; d < count; ++d) {
    cudaDeviceProp properties;
    KV_CUDA_TRY(cudaGetDeviceProperties(&properties, d));
    all.push_back({properties.name, properties.totalGlobalMem, properties.multiProcessorCount});
  }
  return all;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? "the driver shows no GPU" : cudaGetErrorString(status);
}

double replay_on_device(Session& session, std::span<const DevicePoint> points, const DeviceOptions& options,
                        const std::function<bool(std::size_t, DeviceOutcome)>& finished) {
  const auto count = devices().size();
  if (count == 0) throw CudaError("no GPU: " + why_no_device());
  std::vector<std::vector<DealtPoint>> shares(std::min(count, std::max<std::size_t>(1, points.size())));
  std::vector<bool> told(points.size());
  for (std::size_t i = 0; i < points.size(); ++i) {
    try {
      check_point(session.header(), *points[i].entry, *points[i].policy, *points[i].settings);
    } catch (const std::exception&) {
      told[i] = true;
      if (!finished(i, {{}, std::current_exception(), nullptr, 0})) return 0;
      continue;
    }
    shares[i % shares.size()].push_back({i, points[i]});
  }
  SharedSession shared{session, {}};
  Outbox outbox;
  std::vector<std::thread> threads;
  std::vector<double> busy(shares.size());
  for (std::size_t d = 0; d < shares.size(); ++d)
    threads.emplace_back(work, static_cast<int>(d), std::ref(shared), std::cref(shares[d]), std::cref(options),
                         std::ref(outbox), std::ref(busy[d]));
  std::exception_ptr thrown;  // by the caller's function: told when all devices have come to rest
  while (auto outcome = outbox.take(threads.size())) {
    if (told[outcome->first] || thrown) continue;
    told[outcome->first] = true;
    try {
      if (!finished(outcome->first, std::move(outcome->second))) outbox.stop();
    } catch (...) {
      thrown = std::current_exception();
      outbox.stop();
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (thrown) std::rethrow_exception(thrown);
  return std::accumulate(busy.begin(), busy.end(), 0.0) / static_cast<double>(busy.size());
}

}  // namespace kv
