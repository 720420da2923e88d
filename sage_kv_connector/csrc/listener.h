// SPDX-License-Identifier: Apache-2.0
// A listening socket; a full descriptor table must not make its lane spin.
#pragma once

namespace sage_kvt {

class Listener {
 public:
  // Owns `fd`, which is non-blocking.
  explicit Listener(int fd);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int fd() const { return fd_; }
  // A new non-blocking socket, or -1 when none waits.
  int accept();

 private:
  const int fd_;
  int reserve_;  // given up to turn a connection away when there is no descriptor for it
};

}  // namespace sage_kvt
