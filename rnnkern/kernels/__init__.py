"""The Triton kernels. They know pointers, sizes and strides, and nothing of autograd, layers or launching."""
