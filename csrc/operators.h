// What the compiled module can do, on either device.
#pragma once

#include "attention.h"
#include "hint.h"
#include "metrics.h"
#include "place.h"
#include "soft_target.h"

namespace fastkd::cpu {
#include "operators.inc"
}

namespace fastkd::cuda {
#include "operators.inc"
}
