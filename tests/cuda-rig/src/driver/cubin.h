// What a real cubin says about its kernels: the architecture, and each entry's parameters and limits.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace emu {

struct CubinParameter {
  size_t offset = 0, bytes = 0;
};

struct CubinKernel {
  std::string name;
  std::vector<CubinParameter> parameters;
  unsigned threads_max = 1024;  // __launch_bounds__
  size_t static_shared = 0;
};

struct Cubin {
  int arch = 0;
  std::vector<CubinKernel> kernels;
  const CubinKernel* find(const std::string& name) const;
};

// Reads an image as cuModuleLoadData gets it, a pointer without a length. False if it is not a cubin.
bool read_cubin(const void* image, Cubin& out);

// The same of PTX text: the names of its entries and its target.
bool read_ptx(const void* image, Cubin& out);

}  // namespace emu
