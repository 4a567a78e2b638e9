"""What is read: a checkpoint's shards, shape, tensors and vocabulary, and the calibration text."""
