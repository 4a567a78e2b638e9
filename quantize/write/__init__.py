"""What is written: the GGUF in the making, and the work folder that lets a killed run go on. Knows no models."""
