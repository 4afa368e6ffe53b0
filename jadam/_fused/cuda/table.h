// The parameter of the CUDA kernel: a table of leaves, passed by value. Shared by cuda.cc and kernel.cu.

#ifndef JADAM_TABLE_H_
#define JADAM_TABLE_H_

#include "formats.h"

namespace jadam {

using i64 = long long;

constexpr int kThreads = 256;  // of a program, which is a thread block
constexpr int kWarp = 32;      // threads of a warp
constexpr int kQuad = 4;       // consecutive elements, loaded at once
constexpr int kQuads = 2;      // quads that a thread updates in a round
constexpr int kFloatRounds = 2, kInt8Rounds = 4;  // of a program: it moves about 120 KB
constexpr int kRoundElements = kThreads * kQuad * kQuads;
constexpr int kRoundBlocks = kThreads / kWarp * kQuads;  // int8: a warp updates a block at a time
constexpr int kMaxBlock = kWarp * kQuad;                 // elements of an int8 block
constexpr int kMaxLeaves = 32, kMaxDigits = 56;          // of a table

// A digit of a run's number: how many values it has, and how far it moves the global index.
struct Digit {
  u32 size, stride;
};

// A leaf, updated in place. See `LeafArguments` in leaves.h.
struct Entry {
  const void* g;
  void* p;
  i16* remainder;
  void* m[3];
  float* scale[2];
  i64 n;                        // elements
  i64 row;                      // int8: elements of the last axis
  u32 blocks, row_blocks;       // int8: of the leaf, and of a row
  u32 run;                      // used if there are digits
  u32 first_program;            // of the leaf
  u32 salt;
  u32 scalar_row;
  u16 number;                   // of the leaf in the call
  u8 block;                     // int8: elements of a block
  u8 first_digit, digits;
  u8 clipping : 2;
  bool aligned : 1;             // a quad can be loaded at once
  bool contiguous : 1;          // int8: a row is a multiple of the block
};

// Every driver and GPU allows 4096 bytes of parameters.
struct Table {
  i32 leaves;
  Digit digits[kMaxDigits];
  Entry entries[kMaxLeaves];
};
static_assert(sizeof(Table) + 2 * sizeof(void*) <= 4096, "too large for a kernel's parameters");

}  // namespace jadam

#endif  // JADAM_TABLE_H_
