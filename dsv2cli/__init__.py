"""The command line of dsv2: one file a verb in ``commands``, the library calls they translate to beside it."""
