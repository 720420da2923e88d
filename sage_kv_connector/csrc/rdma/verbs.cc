// SPDX-License-Identifier: Apache-2.0
#include "rdma/verbs.h"

#include <dlfcn.h>

namespace sage_kvt {
namespace {

struct Loaded {
  Verbs functions{};
  std::string why;

  Loaded() {
    auto& f = functions;
    open("libibverbs.so.1");
    find("ibv_alloc_pd", &f.alloc_pd);
    find("ibv_dealloc_pd", &f.dealloc_pd);
    find("ibv_reg_mr", &f.reg_mr);
    find("ibv_dereg_mr", &f.dereg_mr);
    find("ibv_create_comp_channel", &f.create_comp_channel);
    find("ibv_destroy_comp_channel", &f.destroy_comp_channel);
    find("ibv_create_cq", &f.create_cq);
    find("ibv_destroy_cq", &f.destroy_cq);
    find("ibv_get_cq_event", &f.get_cq_event);
    find("ibv_ack_cq_events", &f.ack_cq_events);
    find("ibv_query_device", &f.query_device);
    find("ibv_wc_status_str", &f.wc_status_str);
    open("librdmacm.so.1");
    find("rdma_get_devices", &f.get_devices);
    find("rdma_free_devices", &f.free_devices);
    find("rdma_create_event_channel", &f.create_event_channel);
    find("rdma_destroy_event_channel", &f.destroy_event_channel);
    find("rdma_get_cm_event", &f.get_cm_event);
    find("rdma_ack_cm_event", &f.ack_cm_event);
    find("rdma_event_str", &f.event_str);
    find("rdma_create_id", &f.create_id);
    find("rdma_destroy_id", &f.destroy_id);
    find("rdma_bind_addr", &f.bind_addr);
    find("rdma_listen", &f.listen);
    find("rdma_resolve_addr", &f.resolve_addr);
    find("rdma_resolve_route", &f.resolve_route);
    find("rdma_connect", &f.connect);
    find("rdma_accept", &f.accept);
    find("rdma_reject", &f.reject);
    find("rdma_disconnect", &f.disconnect);
    find("rdma_create_qp", &f.create_qp);
    find("rdma_destroy_qp", &f.destroy_qp);
    find("rdma_set_option", &f.set_option);
    find("rdma_get_src_port", &f.get_src_port);
  }

 private:
  const char* name_ = "";
  void* library_ = nullptr;

  void open(const char* name) {
    name_ = name;
    library_ = why.empty() ? ::dlopen(name, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library_ && why.empty()) why = std::string(name) + " (rdma-core) was not found: " + ::dlerror();
  }

  template <typename Function>
  void find(const char* name, Function* function) {
    *function = library_ ? reinterpret_cast<Function>(::dlsym(library_, name)) : nullptr;
    if (library_ && !*function) why = std::string(name_) + " has no " + name;
  }
};

}  // namespace

const Verbs* verbs(std::string* why) {
  static Loaded loaded;
  if (why) *why = loaded.why;
  return loaded.why.empty() ? &loaded.functions : nullptr;
}

}  // namespace sage_kvt
