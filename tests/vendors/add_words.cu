// SPDX-License-Identifier: Apache-2.0
// A kernel for tests, for CUDA and HIP devices and MLUs, or as the host's library that an emulator takes for a module.
#include <cstdint>

#if defined(__HIP__)
#include <hip/hip_runtime.h>
#elif defined(BANG)
#include <bang.h>
#endif

struct Argument {
  uint32_t* words;
  uint64_t count;
  const volatile uint32_t* awaited;  // if there is one: begins when it is not 0 any more
  uint64_t added;
};

#if defined(__CUDACC__) || defined(__HIP__)

extern "C" __global__ void add_words(Argument argument) {
  if (argument.awaited != nullptr)
    while (*argument.awaited == 0) {
    }
  for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < argument.count; i += gridDim.x * blockDim.x)
    argument.words[i] += static_cast<uint32_t>(argument.added);
}

#elif defined(BANG)

extern "C" __mlu_entry__ void add_words(Argument argument) {
  if (argument.awaited != nullptr)
    while (*argument.awaited == 0) {
    }
  for (uint64_t i = taskId; i < argument.count; i += taskDim)
    argument.words[i] += static_cast<uint32_t>(argument.added);
}

#else

#include <unistd.h>

extern "C" {

extern const unsigned add_words_argument_bytes = sizeof(Argument);
void add_words(const void* given, const unsigned[2], unsigned, unsigned) {
  const Argument& argument = *static_cast<const Argument*>(given);
  if (argument.awaited != nullptr)
    while (*argument.awaited == 0) ::usleep(100);
  for (uint64_t i = 0; i < argument.count; ++i) argument.words[i] += static_cast<uint32_t>(argument.added);
}

// Writes what a launch was given into four words.
extern const unsigned write_shape_argument_bytes = sizeof(uint32_t*);
void write_shape(const void* argument, const unsigned blocks[2], unsigned threads, unsigned shared_bytes) {
  uint32_t* words = *static_cast<uint32_t* const*>(argument);
  words[0] = blocks[0];
  words[1] = blocks[1];
  words[2] = threads;
  words[3] = shared_bytes;
}

void has_no_size(const void*, const unsigned[2], unsigned, unsigned) {}

}  // extern "C"

#endif
