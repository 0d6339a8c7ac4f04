"""Who computes: the compiled core on NumPy arrays, or array code on a device. Picked by the arrays' own kind."""
