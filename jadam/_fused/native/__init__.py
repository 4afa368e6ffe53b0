"""The compiled extension, and the code that the CPU kernel and the CUDA kernel share."""
