// SPDX-License-Identifier: Apache-2.0
// Stands for csrc/conversion/paged_converter.cc: the linker takes these definitions and leaves theirs, and with them
// the kernels. Parts are converted by Python here, so nobody calls them.
#include "conversion/paged_converter.h"

namespace sage_kvt {

void PagedConverter::check(const Span&) const { __builtin_trap(); }
size_t PagedConverter::wire_bytes(const Span&) const { __builtin_trap(); }
void PagedConverter::encode(const Span&, uint8_t*) const { __builtin_trap(); }
void PagedConverter::decode(const Span&, const uint8_t*) const { __builtin_trap(); }

}  // namespace sage_kvt
