// SPDX-License-Identifier: Apache-2.0
// Modules and launches: host code in the place of a device's.
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "streams.h"

namespace sage_emulator {
namespace {

constexpr uint64_t kLongestImage = 256 << 20;
// What every device of CUDA's and HIP's takes without being asked for more.
constexpr unsigned kMostThreads = 1024, kMostRows = 65535, kMostShared = 48 << 10;
constexpr unsigned kMostColumns = 0x7fffffff;

// How long a shared library is by its own tables, since the calls that load one are not told; 0 if it is none.
uint64_t image_bytes(const char* image) {
  for (int i = 0; i < SELFMAG; ++i)
    if (image[i] != ELFMAG[i]) return 0;  // the first that differs: what is no library may be shorter
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_type != ET_DYN || header.e_phoff != sizeof header ||
      header.e_phentsize != sizeof(Elf64_Phdr) || header.e_shoff > kLongestImage)
    return 0;
  uint64_t bytes = header.e_shoff + uint64_t{header.e_shnum} * header.e_shentsize;
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    std::memcpy(&segment, image + header.e_phoff + i * sizeof segment, sizeof segment);
    if (segment.p_offset > kLongestImage || segment.p_filesz > kLongestImage) return 0;
    bytes = std::max(bytes, segment.p_offset + segment.p_filesz);
  }
  return bytes;
}

bool write_all(int fd, const char* from, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t written = ::write(fd, from, bytes);  // EFAULT, and no signal, behind a shortened image
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    from += written;
    bytes -= static_cast<uint64_t>(written);
  }
  return true;
}

}  // namespace

Status Machine::module_load(int device, const void* image, void** module) {
  const char* bytes = static_cast<const char*>(image);
  const uint64_t size = bytes == nullptr ? 0 : image_bytes(bytes);
  if (size == 0) return fail(Status::kInvalidImage, "the image is not a shared library of this host");
  // A name of its own: the linker knows a library by its path, also when no file is left there.
  std::string path = std::filesystem::temp_directory_path() / "sage-emulator-module-XXXXXX";
  const int fd = ::mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) return fail(Status::kOutOfMemory, path + ": " + std::strerror(errno));
  const bool whole = write_all(fd, bytes, size);
  ::close(fd);
  void* library = whole ? ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  ::unlink(path.c_str());
  if (library == nullptr)
    return fail(Status::kInvalidImage, whole ? ::dlerror() : "the image ends before its tables say");
  std::lock_guard guard(mutex_);
  modules_[library] = device;
  *module = library;
  return Status::kOk;
}

Status Machine::module_function(void* module, const char* name, void** function) {
  std::lock_guard guard(mutex_);
  const auto loaded = modules_.find(module);
  if (loaded == modules_.end()) return fail(Status::kInvalidHandle, "no such module");
  void* kernel = ::dlsym(module, name);
  const std::string beside = std::string(name) + "_argument_bytes";
  const void* argument_bytes = ::dlsym(module, beside.c_str());
  if (kernel == nullptr) return fail(Status::kNotFound, std::string("the module has no ") + name);
  if (argument_bytes == nullptr) return fail(Status::kNotFound, "the module has no " + beside);
  // A library was loaded for one device, so its address is that device's own.
  functions_[kernel] = {loaded->second, reinterpret_cast<Kernel>(kernel),
                        *static_cast<const unsigned*>(argument_bytes)};
  *function = kernel;
  return Status::kOk;
}

Status Machine::takes(void* function, size_t argument_bytes) {
  std::lock_guard guard(mutex_);
  const auto known = functions_.find(function);
  if (known == functions_.end()) return fail(Status::kInvalidHandle, "no such function");
  if (known->second.argument_bytes <= argument_bytes) return Status::kOk;
  return fail(Status::kInvalidValue, "the argument has " + std::to_string(argument_bytes) +
                                         " bytes, the kernel takes " + std::to_string(known->second.argument_bytes));
}

Status Machine::launch(int device, void* function, Dimensions blocks, Dimensions threads, unsigned shared_bytes,
                       void* stream, void** parameters, void** extra) {
  std::shared_ptr<Stream> found;
  if (const Status status = working_stream(device, stream, &found); status != Status::kOk) return status;
  Function called;
  {
    std::lock_guard guard(mutex_);
    const auto known = functions_.find(function);
    if (known == functions_.end()) return fail(Status::kInvalidHandle, "no such function");
    called = known->second;
  }
  if (called.device != device) return fail(Status::kWrongDevice, "the function was loaded on another device");
  if (blocks.x == 0 || blocks.x > kMostColumns || blocks.y == 0 || blocks.y > kMostRows || threads.x == 0 ||
      threads.x > kMostThreads || shared_bytes > kMostShared)
    return fail(Status::kInvalidValue, std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " blocks of " +
                                           std::to_string(threads.x) + " threads with " + std::to_string(shared_bytes) +
                                           " bytes are more than a device takes, or none");
  if (blocks.z != 1 || threads.y != 1 || threads.z != 1)
    return fail(Status::kInvalidValue, "blocks of more than two dimensions, or threads of more than one");
  if (parameters == nullptr || parameters[0] == nullptr || extra != nullptr)
    return fail(Status::kInvalidValue, "a kernel has its one argument in kernelParams");
  auto launch = std::make_unique<Launch>();
  launch->kernel = called.kernel;
  const auto* argument = static_cast<const uint8_t*>(parameters[0]);
  launch->argument.assign(argument, argument + called.argument_bytes);
  launch->blocks[0] = blocks.x;
  launch->blocks[1] = blocks.y;
  launch->threads = threads.x;
  launch->shared_bytes = shared_bytes;
  for (size_t at = 0; at + sizeof(uint64_t) <= launch->argument.size(); at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, launch->argument.data() + at, sizeof word);
    if (auto allocation = find_allocation(word)) launch->allocations.push_back(std::move(allocation));
    if (auto range = find_host(word)) launch->ranges.push_back(std::move(range));
  }
  launch->hold();
  ++launches_;
  Operation operation{Operation::What::kLaunch, {}, nullptr, 0, {}};
  operation.launch = std::move(launch);
  return enqueue(found, std::move(operation));
}

void Machine::perform(int device, const Launch& launch) {
  // What is freed meanwhile is unmapped at once, so that a kernel that still uses it dies.
  std::vector<std::weak_ptr<Allocation>> opened;
  {
    std::lock_guard guard(mutex_);
    for (const auto& [base, allocation] : allocations_) {
      if (!reaches(device, *allocation)) continue;
      allocation->open_to_kernel();
      opened.push_back(allocation);
    }
  }
  launch.kernel(launch.argument.data(), launch.blocks, launch.threads, launch.shared_bytes);
  std::lock_guard guard(mutex_);
  for (const auto& each : opened)
    if (const auto allocation = each.lock()) allocation->close_to_kernel();
}

}  // namespace sage_emulator
