// SPDX-License-Identifier: Apache-2.0
// Only in an extension that counts its lines (SAGE_KVT_COVERAGE): scripts/counted_process.py calls it, since a process
// that is killed writes nothing at its end.
extern "C" {
void __gcov_dump();
void __gcov_reset();

// Adds to what is written; without the reset gcov writes once only.
__attribute__((visibility("default"))) void sage_kvt_write_counts() {
  __gcov_dump();
  __gcov_reset();
}
}
