#include "cuda/prepass.cu"
