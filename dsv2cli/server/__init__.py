"""dsv2 serve: one model for many programs at once, in the dialects that they speak.

A dialect (chat.py ...) turns a request into ``Generation``s and their events into an answer; it knows nothing of the
engine. The engine (engine.py) is one thread that steps all answers together; prefixes.py keeps what has been read,
disk.py below it on disk, and slots.py by llama-server's numbers. guard.py stands before everything: whose requests are
heard, and how large they may be.
"""
