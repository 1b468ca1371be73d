#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "world.h"

namespace emu {

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;  // what cuMemAlloc promises
constexpr size_t POISON_CHUNK = 2 << 20;
constexpr unsigned char BORDER = 0xff;  // the slack behind an allocation is NaN too

struct Allocation {
  size_t bytes;
  Place place;
  Context* context;
  char* map;
  size_t map_bytes;
  bool freed;
  bool registered;  // the program's own memory, pinned
  char* border() const { return map + map_bytes - PAGE; }
};

using Allocations = std::map<uintptr_t, Allocation>;

// Never destroyed: the executor may outlive main.
Allocations& allocations() {
  static auto* all = new Allocations;
  return *all;
}
std::mutex& lock() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

// The allocation that holds the address or ends there; needs the lock.
Allocations::iterator find(uintptr_t address) {
  auto& all = allocations();
  auto after = all.upper_bound(address);
  if (after == all.begin()) return all.end();
  auto found = std::prev(after);
  return address <= found->first + found->second.bytes ? found : all.end();
}

// Memory that reads as NaN without being paid for: one chunk of all ones, mapped again and again, copied on
// write.
bool poison(char* start, size_t bytes) {
  if (bytes < 2 * POISON_CHUNK) {
    memset(start, 0xff, bytes);
    return true;
  }
  static const int chunk = [] {
    int file = memfd_create("cuda-rig-poison", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, POISON_CHUNK)) return -1;
    void* map = mmap(nullptr, POISON_CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return -1;
    memset(map, 0xff, POISON_CHUNK);
    munmap(map, POISON_CHUNK);
    return file;
  }();
  if (chunk < 0) return false;
  for (size_t at = 0; at < bytes; at += POISON_CHUNK) {
    size_t part = bytes - at < POISON_CHUNK ? bytes - at : POISON_CHUNK;
    void* map =
        mmap(start + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, chunk, 0);
    if (map == MAP_FAILED) return false;
  }
  return true;
}

size_t used_locked(Context* context) {
  size_t used = 0;
  for (auto& [start, one] : allocations())
    if (one.place == Place::Device && one.context == context && !one.freed)
      used += (one.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return used;
}

}  // namespace

void* take(Place place, Context* context, size_t bytes) {
  size_t aligned = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  size_t room = (aligned + PAGE - 1) / PAGE * PAGE;
  std::lock_guard<std::mutex> guard(lock());
  if (place == Place::Device && used_locked(context) + aligned > settings().memory) return nullptr;
  void* map = mmap(nullptr, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* inside = static_cast<char*>(map) + PAGE;
  if (mprotect(inside, room, PROT_READ | PROT_WRITE) || !poison(inside, room)) return nullptr;
  char* start = inside + room - aligned;
  allocations()[uintptr_t(start)] = {bytes,           place, context, static_cast<char*>(map),
                                     room + 2 * PAGE, false, false};
  return start;
}

bool give_back(Place place, void* start) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = allocations().find(uintptr_t(start));
  if (found == allocations().end() || found->second.freed || found->second.place != place) return false;
  if (found->second.registered) return false;
  // Neither unmapped nor reused: whoever still uses it is caught.
  Allocation& one = found->second;
  one.freed = true;
  void* nothing =
      mmap(one.map, one.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (nothing == MAP_FAILED) mprotect(one.map, one.map_bytes, PROT_NONE);
  return true;
}

size_t used_bytes(Context* context) {
  std::lock_guard<std::mutex> guard(lock());
  return used_locked(context);
}

bool is_live(Place place, const void* address, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = find(uintptr_t(address));
  if (found == allocations().end() || found->second.freed || found->second.place != place) return false;
  return uintptr_t(address) + bytes <= found->first + found->second.bytes;
}

bool is_reachable(const void* address) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = find(uintptr_t(address));
  return found != allocations().end() && !found->second.freed;
}

void describe(uintptr_t address, char* text, size_t size) {
  // The thread that faulted holds no lock of ours; another one may for a moment.
  std::lock_guard<std::mutex> guard(lock());
  snprintf(text, size, ": no allocation is near");
  for (auto& [start, one] : allocations()) {
    if (one.registered || address < uintptr_t(one.map) || address >= uintptr_t(one.map) + one.map_bytes)
      continue;
    size_t end = start + one.bytes;
    const char* kind = one.place == Place::Device ? "device" : "pinned";
    if (one.freed)
      snprintf(text, size, ": in a %s allocation of %zu bytes that was freed", kind, one.bytes);
    else if (address >= end)
      snprintf(text, size, ": %zu bytes past the end of a %s allocation of %zu bytes", size_t(address - end),
               kind, one.bytes);
    else
      snprintf(text, size, ": %zu bytes before a %s allocation of %zu bytes", size_t(start - address), kind,
               one.bytes);
    return;
  }
}

bool borders_whole(const char* after) {
  std::lock_guard<std::mutex> guard(lock());
  bool whole = true;
  for (auto& [start, one] : allocations()) {
    if (one.freed || one.registered) continue;
    char* end = reinterpret_cast<char*>(start) + one.bytes;
    for (char* at = end; at < one.border(); at++) {
      if (static_cast<unsigned char>(*at) == BORDER) continue;
      report("%s wrote past the end of a device allocation of %zu bytes", after, one.bytes);
      memset(end, BORDER, size_t(one.border() - end));
      whole = false;
      break;
    }
  }
  return whole;
}

bool pin(void* start, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = find(uintptr_t(start));
  if (found != allocations().end() && !found->second.freed) return false;
  allocations()[uintptr_t(start)] = {bytes, Place::Pinned, nullptr, nullptr, 0, false, true};
  return true;
}
bool unpin(void* start) {
  std::lock_guard<std::mutex> guard(lock());
  auto found = allocations().find(uintptr_t(start));
  if (found == allocations().end() || !found->second.registered) return false;
  allocations().erase(found);
  return true;
}

}  // namespace emu
