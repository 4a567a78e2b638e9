"""What is encoded: rows of float32 to the blocks of a GGUF tensor, under covariances. Knows matrices alone."""
