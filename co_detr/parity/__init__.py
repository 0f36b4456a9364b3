"""Number-for-number comparison with tensors dumped from the reference implementation."""
