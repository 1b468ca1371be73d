// The product itself: c = alpha op(a) op(b) + beta c, column-major.
#pragma once

#include "api.h"

namespace emu {

struct Matrix {
  const void* values;
  DataType type;
  int ld;
  bool transposed;
};

struct Product {
  int m, n, k;
  float alpha, beta;
  Matrix a, b;
  void* c;
  DataType c_type;
  int c_ld;
};

// Sums in f32, in an order that depends on the shape, as the real library's does.
void multiply(const Product& product);

}  // namespace emu
