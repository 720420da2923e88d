// SPDX-License-Identifier: Apache-2.0
// The little that these tests need of a test framework.
#pragma once

#include <cstdio>
#include <cstdlib>

// Ends the program, naming the condition, if it does not hold.
#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

// Runs `function` and says so.
#define RUN(function, ...)                      \
  do {                                          \
    std::fprintf(stderr, "%s ", #function);     \
    function(__VA_ARGS__);                      \
    std::fprintf(stderr, "%s\n", #__VA_ARGS__); \
  } while (false)
