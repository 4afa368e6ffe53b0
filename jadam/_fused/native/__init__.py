"""The extension: element functions, and what the kernels of the CPU and of CUDA share."""
