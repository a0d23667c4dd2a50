/* The engine for every processor. */
#include "platform.h"

#include "dtypes.h"
#include "job.h"

#define VECTOR_BYTES 16
static int is_available(void) { return 1; }
#define ENGINE normswap_baseline
#define ENGINE_NAME "baseline"
#define ENGINE_IS_AVAILABLE is_available
#include "engine.h"
