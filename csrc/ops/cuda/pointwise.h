#pragma once

#include "kernels.h"

namespace cellstep {
namespace cuda {

/// Of a device, asked for once.
int multiprocessors(int device);

}  // namespace cuda
}  // namespace cellstep
