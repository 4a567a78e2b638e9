"""What is read: a checkpoint or a GGUF, its weights, shape and vocabulary, and the calibration text."""
