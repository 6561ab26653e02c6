#include "cuda/sm80/clip_qk_layernorm_launch.cuh"
