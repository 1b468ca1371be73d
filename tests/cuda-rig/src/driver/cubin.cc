// Cubins are ELF files. A kernel's `.nv.info.NAME` section is a list of attributes {format u8, number u8,
// size or value u16, payload}; the numbers used here are those that public disassemblers print (EIATTR_*).
#include "cubin.h"

#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emu {

namespace {

constexpr unsigned MACHINE_CUDA = 190;
constexpr unsigned FORMAT_SIZED = 4;
constexpr unsigned ATTRIBUTE_MAX_THREADS = 0x05;  // u32 x, y, z
constexpr unsigned ATTRIBUTE_PARAMETER =
    0x17;  // u32 index, u16 ordinal, u16 offset, u32 with the size above bit 18

uint16_t u16(const unsigned char* at) { return uint16_t(at[0] | at[1] << 8); }
uint32_t u32(const unsigned char* at) { return uint32_t(u16(at)) | uint32_t(u16(at + 2)) << 16; }

void read_attributes(const unsigned char* at, size_t size, CubinKernel& kernel) {
  const unsigned char* end = at + size;
  while (at + 4 <= end) {
    unsigned format = at[0], number = at[1];
    size_t payload = format == FORMAT_SIZED ? u16(at + 2) : 0;
    const unsigned char* data = at + 4;
    if (data + payload > end) return;
    if (format == FORMAT_SIZED && number == ATTRIBUTE_PARAMETER && payload >= 12) {
      size_t ordinal = u16(data + 4);
      if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1);
      kernel.parameters[ordinal] = {u16(data + 6), u32(data + 8) >> 18};
    }
    if (format == FORMAT_SIZED && number == ATTRIBUTE_MAX_THREADS && payload >= 12)
      kernel.threads_max = u32(data) * u32(data + 4) * u32(data + 8);
    at = data + payload;
  }
}

// The rest of `text` behind `prefix`; null if it does not begin with it.
const char* behind(const char* text, const char* prefix) {
  size_t size = strlen(prefix);
  return strncmp(text, prefix, size) ? nullptr : text + size;
}

}  // namespace

const CubinKernel* Cubin::find(const std::string& name) const {
  for (const CubinKernel& kernel : kernels)
    if (kernel.name == name) return &kernel;
  return nullptr;
}

bool read_cubin(const void* image, Cubin& out) {
  const char* bytes = static_cast<const char*>(image);
  Elf64_Ehdr header;
  if (memcmp(bytes, ELFMAG, SELFMAG)) return false;
  memcpy(&header, bytes, sizeof header);
  if (header.e_machine != MACHINE_CUDA || header.e_ident[EI_CLASS] != ELFCLASS64) return false;
  // Flags carry the architecture in their lowest byte, in newer files in the next one.
  unsigned low = header.e_flags & 0xff, next = header.e_flags >> 8 & 0xff;
  out.arch = int(low >= 50 && low < 200 ? low : next);
  const char* sections = bytes + header.e_shoff;
  auto section = [&](unsigned i) {
    Elf64_Shdr s;
    memcpy(&s, sections + size_t(i) * header.e_shentsize, sizeof s);
    return s;
  };
  const char* names = bytes + section(header.e_shstrndx).sh_offset;
  for (unsigned i = 0; i < header.e_shnum; i++) {
    Elf64_Shdr s = section(i);
    if (const char* kernel = behind(names + s.sh_name, ".nv.info.")) {
      out.kernels.push_back({kernel, {}, 1024, 0});
      read_attributes(reinterpret_cast<const unsigned char*>(bytes) + s.sh_offset, s.sh_size,
                      out.kernels.back());
    }
  }
  for (unsigned i = 0; i < header.e_shnum; i++) {
    Elf64_Shdr s = section(i);
    if (const char* name = behind(names + s.sh_name, ".nv.shared."))
      for (CubinKernel& kernel : out.kernels)
        if (kernel.name == name) kernel.static_shared = s.sh_size;
  }
  return true;
}

bool read_ptx(const void* image, Cubin& out) {
  const char* text = static_cast<const char*>(image);
  const char* target = strstr(text, ".target sm_");
  if (memcmp(text, "//", 2) && memcmp(text, ".version", 8) && text[0] != '\n') return false;
  if (!target) return false;
  out.arch = atoi(target + strlen(".target sm_"));
  for (const char* at = text; (at = strstr(at, ".entry "));) {
    at += strlen(".entry ");
    out.kernels.push_back({std::string(at, strcspn(at, " (\n")), {}, 1024, 0});
  }
  return true;
}

}  // namespace emu
