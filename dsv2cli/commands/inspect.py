HELP = "x"


def inspect() -> None: ...
