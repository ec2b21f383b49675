"""The operators: each in a folder with its public function, the torch reference and the Triton kernels."""
