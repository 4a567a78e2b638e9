"""What a model will take and give, before it is fetched: bytes, disk, memory, speed.

subject.py finds what is meant and, from headers alone, lays a hollow file of its shape where anatomy.py can study it;
hollow.py lays a few of its layers and probe.py runs them to measure this machine; forecast.py is the arithmetic;
trial.py measures the real file beside it.
"""
