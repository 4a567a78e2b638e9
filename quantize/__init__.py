"""Turns a Hugging Face checkpoint of the DeepSeek-V2 family into a calibrated, low-bit GGUF, one layer at a time."""
