"""Many requests from a file, answered into a file that survives whatever ends the run. Knows no model: see ``Desk``."""
