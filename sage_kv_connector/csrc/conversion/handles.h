// SPDX-License-Identifier: Apache-2.0
// What Python holds of a pool: a share of it, since transfers hold one too. Its threads end with the handle.
#pragma once

#include <memory>

#include "conversion/pool.h"

namespace sage_kvt {

struct PoolHandle {
  explicit PoolHandle(int threads, bool stepped = false) : pool(std::make_shared<ConversionPool>(threads, stepped)) {}
  ~PoolHandle() { pool->close(); }
  PoolHandle(const PoolHandle&) = delete;
  PoolHandle& operator=(const PoolHandle&) = delete;
  const std::shared_ptr<ConversionPool> pool;
};

}  // namespace sage_kvt
