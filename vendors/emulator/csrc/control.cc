// SPDX-License-Identifier: Apache-2.0
// What only an emulator exports.
#include <string>

#include "machine.h"

extern "C" __attribute__((visibility("default"))) const char* sage_emulator_configure(const char* text) {
  static thread_local std::string wrong;
  wrong = sage_emulator::Machine::get().configure(text);
  return wrong.c_str();
}
