HELP = "x"


def perplexity() -> None: ...
