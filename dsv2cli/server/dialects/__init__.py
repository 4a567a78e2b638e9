"""One file a dialect: its fields to ``Generation``s, and their events to its answers. app.py has the paths."""
