// SPDX-License-Identifier: Apache-2.0
// What Python holds of prepared streams. Each is a share of the object: lanes drop theirs without the interpreter.
#pragma once

#include <memory>

#include "paged/cursor.h"

namespace sage_kvt {

struct LayoutHandle {
  std::shared_ptr<const PageLayout> layout;
};
struct TablesHandle {
  std::shared_ptr<PageTables> tables;
};
struct CursorHandle {
  std::shared_ptr<PagedCursor> cursor;
};

}  // namespace sage_kvt
