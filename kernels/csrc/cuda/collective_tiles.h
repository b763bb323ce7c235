// Sizes of the collectives' micro-kernels that their checks read too: only `constexpr int NAME = expression;`.
#pragma once

constexpr int COLLECTIVE_MAX_REGISTERS = 64;
