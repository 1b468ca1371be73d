#include "segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace emu {

namespace {

constexpr const char* PREFIX = "cuda-rig-nccl-";

// Files whose id's maker is gone: all its ranks were killed before they had joined.
void sweep() {
  DIR* folder = opendir("/dev/shm");
  if (!folder) return;
  while (dirent* entry = readdir(folder)) {
    if (strncmp(entry->d_name, PREFIX, strlen(PREFIX))) continue;
    long maker = strtol(entry->d_name + strlen(PREFIX), nullptr, 10);
    if (maker > 0 && kill(pid_t(maker), 0) && errno == ESRCH)
      shm_unlink((std::string("/") + entry->d_name).c_str());
  }
  closedir(folder);
}

}  // namespace

NcclId new_id() {
  sweep();
  NcclId id;
  memset(&id, 0, sizeof id);
  uint64_t random[2] = {0, 0};
  int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  if (file < 0 || read(file, random, sizeof random) != sizeof random) random[0] = uint64_t(getpid());
  if (file >= 0) close(file);
  snprintf(id.text, sizeof id.text, "/%s%d-%016llx%016llx", PREFIX, getpid(), (unsigned long long)random[0],
           (unsigned long long)random[1]);
  return id;
}

Segment* open_segment(const NcclId& id) {
  if (id.text[0] != '/' || strncmp(id.text + 1, PREFIX, strlen(PREFIX)) ||
      !memchr(id.text, 0, sizeof id.text))
    return nullptr;
  int file = shm_open(id.text, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) return nullptr;
  // Untouched parts take no memory.
  void* map = ftruncate(file, sizeof(Segment))
                  ? MAP_FAILED
                  : mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return map == MAP_FAILED ? nullptr : static_cast<Segment*>(map);
}

void unlink_segment(const NcclId& id) { shm_unlink(id.text); }

}  // namespace emu
