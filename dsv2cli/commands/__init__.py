"""One file a verb: parse, one library call, print. Heavy imports wait inside the functions: --help must be fast."""
