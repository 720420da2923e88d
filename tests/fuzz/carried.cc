// SPDX-License-Identifier: Apache-2.0
// What a peer says of a path over a library: notes of every kind, cells with any notice; and what the library does with
// the reads that come of it: they end in any order, well or not, before and after their window or connection ended.
#include <map>

#include "../cpp/check.h"
#include "attacked_connection.h"
#include "carried/carried_endpoint.h"
#include "hostile_notice.h"
#include "system_calls.h"

namespace sage_kvt::fuzz {
namespace {

using Kind = CarriedNote::Kind;
// Bits of an input's first byte.
constexpr uint8_t kTrusted = 1, kPosts = 2, kSums = 4, kDescribed = 8;
constexpr size_t kSlots = 2;
enum Move : uint8_t {
  kNote,
  kBytes,
  kNotice,
  kJob,
  kMet,
  kRead,
  kTakeEvents,
  kAuthorize,
  kCloseWindow,
  kCancel,
  kMoves
};

SteppedEndpoint<CarriedEndpoint>& endpoint() {
  static auto* made = [] {
    auto* fresh =
        new SteppedEndpoint<CarriedEndpoint>(stepped_options(1), TcpOptions{}, CarriedOptions{"fuzzed", kSlots});
    fresh->describe_library("described");
    return fresh;
  }();
  return *made;
}

class Library {
 public:
  // False if there is none.
  bool take_job() {
    const auto job = endpoint().next_job(0);
    if (!job) return false;
    if (job->what != CarriedJob::What::kRead) return true;
    uint64_t length = 0;
    for (const auto& row : job->read->rows) {
      CHECK(row.local >= endpoint().slots().begin());
      CHECK(row.local + row.length <= endpoint().slots().begin() + endpoint().slots().size());
      length += row.length;
    }
    CHECK(length > 0 && length <= endpoint().slots().bytes());
    CHECK(reads_.emplace(job->read->number, job->read).second && reads_.size() <= kSlots);
    return true;
  }
  void end_one(size_t which, uint8_t byte, bool fails) {
    if (reads_.empty()) return;
    const auto found = std::next(reads_.begin(), static_cast<long>(which % reads_.size()));
    for (const auto& row : found->second->rows) std::memset(reinterpret_cast<void*>(row.local), byte, row.length);
    endpoint().read_ended(found->first, fails);
    reads_.erase(found);
  }
  bool idle() const { return reads_.empty(); }

 private:
  std::map<uint64_t, std::shared_ptr<CarriedRead>> reads_;
};

// False once the peer broke the protocol: whoever hears a note ends the connection then.
bool hear(const AttackedConnection& attacked, const std::string& note) {
  if (!attacked.authorized() || attacked.connection()->closed()) return true;
  return endpoint().on_note(attacked.connection(), note);
}

CarriedNote note_from(Input& input) {
  CarriedNote note{static_cast<Kind>(input.byte() % 6)};
  const uint8_t how = input.byte();
  note.total = how & 1 ? input.number<uint64_t>() : input.byte();
  note.offset = how & 2 ? input.number<uint64_t>() : 0;
  if (note.kind == Kind::kWord && how & 4)
    note.total = PathWord{static_cast<Told>(input.byte() % 5), input.byte(), input.byte()}.packed();
  const auto body = input.bytes(how & 8 ? input.number<uint16_t>() : input.byte() % 16);
  note.body.assign(body.begin(), body.end());
  return note;
}

void move(Input& input, AttackedConnection& attacked, Library& library) {
  const uint8_t what = input.byte();
  bool sense = true;
  switch (static_cast<Move>(what % kMoves)) {
    case kNote:
      sense = hear(attacked, note_of(note_from(input)));
      break;
    case kBytes: {
      const auto bytes = input.bytes(input.number<uint16_t>());
      const std::string note(bytes.begin(), bytes.end());
      if (const auto read = carried_note_of(note)) {
        std::string again = note_of(*read);
        std::copy_n(note.begin() + 4, 4, again.begin() + 4);  // what nobody reads
        CHECK(again == note);
      }
      sense = hear(attacked, note);
      break;
    }
    case kNotice: {
      const auto [cell, bytes] = notice_from(input, attacked);
      sense = hear(attacked, note_of({Kind::kWord, PathWord{Told::kChunk, cell}.packed(), 0, bytes}));
      break;
    }
    case kJob:
      library.take_job();
      break;
    case kMet:
      endpoint().met(attacked.connection()->id, what & 128 ? "it can't" : "");
      break;
    case kRead:
      library.end_one(input.byte(), input.byte(), what & 128);
      break;
    case kTakeEvents:
      attacked.take_events();
      break;
    case kAuthorize:
      attacked.authorize();
      break;
    case kCloseWindow:
      attacked.close_window();  // it waits for no library
      break;
    case kCancel:
      attacked.cancel();
      break;
    case kMoves:
      break;
  }
  if (!sense) endpoint().close_connection(attacked.connection()->id, Status::kProtocolError, "a note is not valid");
  if (!(what & 64)) attacked.turn();
}

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  endpoint();
  machine().reset();
  const uint8_t flags = input.byte();
  {
    Library library;
    AttackedConnection attacked(endpoint(), true);
    if (flags & kTrusted) attacked.authorize();
    if (flags & kDescribed) {  // there is a path from the beginning
      hear(attacked, note_of({Kind::kDescription, 1, 0, "x"}));
      library.take_job();
      attacked.turn();
    }
    if (flags & kPosts) attacked.post(flags & kSums);
    while (!input.empty()) move(input, attacked, library);
    attacked.end();
    while (library.take_job() || !library.idle()) library.end_one(0, 1, false);
    CHECK(library.idle());
  }
  // Every slot came back.
  std::vector<uint64_t> taken;
  for (size_t i = 0; i < kSlots; ++i) {
    taken.push_back(endpoint().slots().take(nullptr));
    CHECK(taken.back() != 0);
  }
  for (const uint64_t slot : taken) endpoint().slots().give_back(slot);
  CHECK(machine().open.empty());
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
