#include "settings.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace emu {

namespace {

long number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtol(text, nullptr, 10) : otherwise;
}

size_t bytes(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  if (!text || !*text) return otherwise;
  char* end;
  size_t value = strtoull(text, &end, 10);
  switch (*end) {
    case 'K':
      return value << 10;
    case 'M':
      return value << 20;
    case 'G':
      return value << 30;
    default:
      return value;
  }
}

// The visible devices. As the real variable: an entry that names no device ends the list.
std::vector<int> visible(int count) {
  std::vector<int> devices;
  const char* text = getenv("CUDA_VISIBLE_DEVICES");
  if (!text) {
    for (int i = 0; i < count; i++) devices.push_back(i);
    return devices;
  }
  while (*text) {
    char* end;
    long device = strtol(text, &end, 10);
    if (end == text || device < 0 || device >= count) break;
    devices.push_back(int(device));
    text = *end == ',' ? end + 1 : end;
  }
  return devices;
}

Settings read() {
  Settings s;
  s.seed = uint64_t(number("CUDA_EMU_SEED", 1));
  s.devices = visible(int(number("CUDA_EMU_DEVICES", 2)));
  s.arch = number("CUDA_EMU_ARCH", 80) == 90 ? 90 : 80;
  s.memory = bytes("CUDA_EMU_MEMORY", size_t(4) << 30);
  s.lazy_us = number("CUDA_EMU_LAZY_US", 2000);
  s.nccl_slow_abort = number("CUDA_EMU_NCCL_SLOW_ABORT", 0) != 0;
  s.nccl_graph_hold = number("CUDA_EMU_NCCL_GRAPH_HOLD", 1) != 0;
  return s;
}

}  // namespace

const Settings& settings() {
  static const Settings* once = new Settings(read());
  return *once;
}

void report(const char* format, ...) {
  char text[2048];
  int used = snprintf(text, sizeof text, "[cuda-rig %d] ", getpid());
  va_list list;
  va_start(list, format);
  int more = vsnprintf(text + used, sizeof text - size_t(used) - 1, format, list);
  va_end(list);
  size_t size = strlen(text);
  text[size] = '\n';
  (void)more;
  // One write: lines of several processes on one terminal stay whole.
  if (write(2, text, size + 1) < 0) return;
}

}  // namespace emu
