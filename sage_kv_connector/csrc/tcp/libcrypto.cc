// SPDX-License-Identifier: Apache-2.0
#include "tcp/libcrypto.h"

#include <dlfcn.h>

namespace sage_kvt {
namespace {

constexpr const char* kLibrary = "libcrypto.so.3";

struct Loaded {
  LibCrypto functions{};
  std::string why;

  Loaded() {
    void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      why = std::string(kLibrary) + " (OpenSSL 3) was not found: " + ::dlerror();
      return;
    }
    auto& f = functions;
    find(library, "EVP_CIPHER_CTX_new", &f.new_context);
    find(library, "EVP_CIPHER_CTX_free", &f.free_context);
    find(library, "EVP_aes_128_gcm", &f.aes_128_gcm);
    find(library, "EVP_CipherInit_ex", &f.init);
    find(library, "EVP_CipherUpdate", &f.update);
    find(library, "EVP_CipherFinal_ex", &f.finish);
    find(library, "EVP_CIPHER_CTX_ctrl", &f.control);
    find(library, "OPENSSL_cleanse", &f.cleanse);
    find(library, "OpenSSL_version", &f.version);
  }

  template <typename Function>
  void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(::dlsym(library, name));
    if (!*function) why = std::string(kLibrary) + " has no " + name;
  }
};

}  // namespace

const LibCrypto* libcrypto(std::string* why) {
  static const Loaded loaded;
  if (why) *why = loaded.why;
  return loaded.why.empty() ? &loaded.functions : nullptr;
}

}  // namespace sage_kvt
