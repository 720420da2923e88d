// SPDX-License-Identifier: Apache-2.0
// What only an emulator exports.
#include <cstdint>
#include <string>

#include "machine.h"

extern "C" __attribute__((visibility("default"))) const char* sage_emulator_configure(const char* text) {
  static thread_local std::string wrong;
  wrong = sage_emulator::Machine::get().configure(text);
  return wrong.c_str();
}

extern "C" __attribute__((visibility("default"))) uint64_t sage_emulator_launches() {
  return sage_emulator::Machine::get().launches();
}

extern "C" __attribute__((visibility("default"))) void sage_emulator_forget_memory() {
  sage_emulator::Machine::get().forget_memory();
}

// For each direction, in the order of its enum: calls, copies, bytes.
extern "C" __attribute__((visibility("default"))) void sage_emulator_counts(uint64_t* out) {
  for (const auto& counts : sage_emulator::Machine::get().counts()) {
    *out++ = counts.calls;
    *out++ = counts.copies;
    *out++ = counts.bytes;
  }
}
