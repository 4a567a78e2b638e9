"""What runs a model: dsv2's own engine, for the architecture it is written for, and llama.cpp for every other.

What a conversation, the token loop and the measurements need of a model is in protocol.py; ``runtime.open_model``
opens a file with the engine that choice.py names. llama.cpp is imported where it runs something, and not before.
"""
