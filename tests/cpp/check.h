// SPDX-License-Identifier: Apache-2.0
// A failed check names its expression and both values, and ends the test program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <iostream>

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #condition " does not hold\n"; \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

#define CHECK_EQUAL(a, b)                                                                                    \
  do {                                                                                                       \
    const auto left = (a);                                                                                   \
    const auto right = (b);                                                                                  \
    if (!(left == right)) {                                                                                  \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #a " is " << left << ", " #b " is " << right << "\n"; \
      std::abort();                                                                                          \
    }                                                                                                        \
  } while (false)

#define RUN(test)               \
  do {                          \
    std::cerr << #test << "\n"; \
    test;                       \
  } while (false)
