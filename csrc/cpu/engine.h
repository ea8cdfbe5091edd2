// The CPU engine: G weight sets over their sequences, forward and backward, on plain pointers.
// Every buffer is the caller's; nothing is kept between calls.
//
// Problem::dtype, in which everything is computed, is float32 or float64. Matrices and norms have
// the same dtype, or, where it is float32, bfloat16, which is widened as it is read. Where a single
// float32 step keeps nothing, matrices may be int8: see int8.h. Anything else throws
// std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace mmixer::cpu {

// Throws std::invalid_argument for a problem that the engine does not take, as the others do.
void check(const Problem& problem);

// The elements of Problem::dtype that forward saves for backward, and that each needs as scratch
// memory, which depends on Problem::threads.
int64_t saved_size(const Problem& problem);
int64_t forward_workspace_size(const Problem& problem);
int64_t backward_workspace_size(const Problem& problem, bool need_weights);

// The elements of Problem::packed, and what writes them: a problem of one group, of which the
// weights alone are read. Calls of any T, B and lengths may have it while these weights are what
// they were; one with another instruction set in use, or another dtype, throws.
int64_t packed_size(const Problem& problem);
void pack(const Problem& problem, void* packed);

// Writes each group's Group::share, [G, 2, B, H], to the bits of what forward computes; inputs and
// hx are not read. The workspace is forward's.
void context_share(const Problem& problem, void* share, void* workspace);

// Writes the results; saved is null where Problem::keep is nothing. Output and h_n may be one where
// T is 1, and h_n, as then output, may be hx.
void forward(const Problem& problem, const Results& results, void* saved, void* workspace);

// Writes gradient [G] and, unless it is null, grad_hx [G, B, H], contiguous.
void backward(const Problem& problem, const Cotangents& cotangents, const void* saved,
              const GroupGradient* gradient, void* grad_hx, void* workspace);

// The sets among "avx512", "avx2" and "baseline" that this build and this processor have, the best
// first.
std::vector<std::string> instruction_sets();
// The set in use: the best, unless a test has asked for another.
std::string instruction_set();
// Returns false where there is no such set. It must not be called beside a running call.
bool use_instruction_set(const std::string& name);

}  // namespace mmixer::cpu
