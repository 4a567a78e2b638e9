HELP = "x"


def quantize() -> None: ...
