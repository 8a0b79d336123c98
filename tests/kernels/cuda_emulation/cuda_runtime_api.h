// The part of the runtime that csrc/bind/bind_cuda.cpp wants.
#pragma once

#include "cuda_runtime.h"
