// Runs the cases: harness [--seeds N] [--first SEED] [--only TEXT] [--list]
//
// Exits with 0 if all runs passed, 1 if one failed, 2 for a wrong argument, 3 if no case was selected. A race
// detector or an address checker exits with its own code after its report.
#include <sys/mman.h>
#include <cstring>

#include <map>

#include "harness.h"

namespace harness {

namespace {

Case* cases = nullptr;
constexpr size_t PAGE = 4096;

const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

#if !defined(RIG_ASAN)
struct Memory {
  char* map;
  size_t map_bytes;
};
std::map<uintptr_t, Memory>& memories() {
  static auto* all = new std::map<uintptr_t, Memory>;
  return *all;
}

void describe(uintptr_t address, char* text, size_t size) {
  for (auto& [start, memory] : memories()) {
    uintptr_t first = uintptr_t(memory.map), last = first + memory.map_bytes, end = last - PAGE;
    if (address < first || address >= last) continue;
    if (address >= end)
      snprintf(text, size, ": %zu bytes past the end of a buffer of %zu bytes", size_t(address - end),
               size_t(end - start));
    else
      snprintf(text, size, ": %zu bytes before a buffer of %zu bytes", size_t(start - address),
               size_t(end - start));
  }
}
#else
void describe(uintptr_t, char*, size_t) {}
#endif

// The type out of what the compiler prints for TypeName<T>::get; kernel files are compiled in an unnamed
// namespace.
std::string plain_type(const char* text) {
  std::string type = text;
  type = type.substr(type.find("T = ") + 4);
  type = type.substr(0, type.rfind(']'));
  const std::string unnamed = "{anonymous}::";
  for (size_t at; (at = type.find(unnamed)) != std::string::npos;) type.erase(at, unnamed.size());
  return type;
}

std::string formatted(const char* format, va_list list) {
  char text[1024];
  vsnprintf(text, sizeof text, format, list);
  return text;
}

}  // namespace

Case::Case(const char* name, const char* file, void (*body)(Run&))
    : name(name), file(file), body(body), next(cases) {
  cases = this;
}

uint64_t Random::next() {
  state_ += 0x9e3779b97f4a7c15ull;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
float Random::uniform(float low, float high) {
  return low + (high - low) * float(next() >> 40) / float(1 << 24);
}
float Random::normal() {
  // A sum of uniform numbers: near enough to a normal one, and the same on every machine.
  float sum = 0;
  for (int i = 0; i < 6; i++) sum += uniform();
  return sum * 0.70710678f;
}

#if defined(RIG_ASAN)
void* take_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes)) abort();
  memset(memory, 0xff, bytes);
  return memory;
}
void give_memory(void* memory, size_t) { free(memory); }
#else
void* take_memory(size_t bytes) {
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE, all = room + 2 * PAGE;
  char* map = static_cast<char*>(mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map == MAP_FAILED || (room && mprotect(map + PAGE, room, PROT_READ | PROT_WRITE))) abort();
  // The last byte meets the guard page. Where that spoils the alignment a kernel may rely on, up to 15 bytes
  // stay open.
  char* start = map + PAGE + room - (bytes + 15) / 16 * 16;
  memset(map + PAGE, 0xff, room);
  memories()[uintptr_t(start)] = {map, all};
  return start;
}
void give_memory(void* memory, size_t) {
  auto found = memories().find(uintptr_t(memory));
  munmap(found->second.map, found->second.map_bytes);
  memories().erase(found);
}
#endif

void Run::check(bool holds, const char* format, ...) {
  if (holds) return;
  va_list list;
  va_start(list, format);
  std::string text = formatted(format, list);
  va_end(list);
  throw Failed{text};
}
void Run::failed(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::string text = formatted(format, list);
  va_end(list);
  throw Failed{text};
}

void Run::launch_checked(const char* name, const rig::Launch& launch, size_t count, void** arguments,
                         const char* const* types) {
  const rig::Kernel* kernel = rig::find_kernel(name);
  check(kernel, "no kernel is named %s", name);
  check(kernel->parameter_count == count, "%s has %u parameters, %zu were given", name,
        kernel->parameter_count, count);
  for (size_t i = 0; i < count; i++)
    check(plain_type(kernel->parameters[i].type) == plain_type(types[i]),
          "%s: parameter %zu is %s, given was %s", name, i, plain_type(kernel->parameters[i].type).c_str(),
          plain_type(types[i]).c_str());
  rig::Outcome outcome = rig::run(*kernel, launch, arguments, random.next());
  check(bool(outcome), "%s", outcome.report.c_str());
}

}  // namespace harness

int main(int count, char** words) {
  using namespace harness;
  uint64_t seeds = 10, first = 1;
  const char* only = nullptr;
  bool list = false;
  for (int i = 1; i < count; i++) {
    std::string word = words[i];
    bool more = i + 1 < count;
    if (word == "--list")
      list = true;
    else if (word == "--seeds" && more)
      seeds = strtoull(words[++i], nullptr, 10);
    else if (word == "--first" && more)
      first = strtoull(words[++i], nullptr, 10);
    else if (word == "--only" && more)
      only = words[++i];
    else {
      fprintf(stderr, "harness: unknown argument '%s'; known: --list, --seeds N, --first SEED, --only TEXT\n",
              words[i]);
      return 2;
    }
  }
  rig::catch_faults(describe);
  rig::prepare_thread();
  unsigned selected = 0, failures = 0;
  for (Case* one = cases; one; one = one->next) {
    std::string name = std::string(file_name(one->file)) + ": " + one->name;
    if (only && name.find(only) == std::string::npos) continue;
    selected++;
    if (list) {
      printf("%s\n", name.c_str());
      continue;
    }
    for (uint64_t seed = first; seed < first + seeds; seed++) {
      Run run(seed);
      try {
        one->body(run);
      } catch (const Failed& failed) {
        printf("FAILED %s (seed %llu): %s\n", name.c_str(), (unsigned long long)seed, failed.text.c_str());
        failures++;
        break;
      }
      if (seed + 1 == first + seeds) printf("ok %s\n", name.c_str());
    }
    fflush(stdout);
  }
  if (!selected) {
    fprintf(stderr, "harness: no case's name has '%s' in it\n", only ? only : "");
    return 3;
  }
  return failures != 0;
}
