// SPDX-License-Identifier: Apache-2.0
// The functions of OpenSSL's libcrypto that lanes call, found at run time: nothing of OpenSSL is needed to build or to
// install, and without it everything works but `protect`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// As OpenSSL declares it.
struct evp_cipher_ctx_st;

namespace sage_kvt {

struct LibCrypto {
  using Context = evp_cipher_ctx_st;
  Context* (*new_context)();
  void (*free_context)(Context*);
  const void* (*aes_128_gcm)();
  // 1 is success in all of these.
  int (*init)(Context*, const void* cipher, void* engine, const uint8_t* key, const uint8_t* iv, int seals);
  int (*update)(Context*, uint8_t* out, int* written, const uint8_t* in, int length);
  int (*finish)(Context*, uint8_t* out, int* written);
  int (*control)(Context*, int what, int number, void* data);
  void (*cleanse)(void*, size_t);
  const char* (*version)(int what);
};

// The same for the whole process; nullptr if there is none, and why.
const LibCrypto* libcrypto(std::string* why);

}  // namespace sage_kvt
