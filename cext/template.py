"""template.py: a file's chat template, rendered as transformers renders it, with the origin of every character.

A template is a program that came with a file: it runs in Jinja's sandbox, for a bounded time, and writes a bounded
text. The environment is transformers' (``_cached_compile_jinja_template``): the text that comes out is the same to the
character. What is added is that it is Traced: the compiler marks the template's own literals, and nothing else.
"""

from __future__ import annotations

import contextvars
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from cext.errors import TemplateError
from cext.traced import MAX_LENGTH, TEMPLATE, TooLong, Traced, checked, joined, origins_of, written

MAX_SECONDS = 5.0  # of processor time for one rendering: the largest templates of the family take milliseconds
MAX_NUMBER = 1 << 20  # that a template may give to a function or a filter: widths, counts, indents
MAX_SOURCE = 1 << 20  # characters of a template
PADS = frozenset({"batch", "center", "format", "indent", "slice", "tojson", "truncate", "wordwrap"})  # filters
JOIN = jinja2.filters.FILTERS["join"]
HINT = "the template is part of the file"

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


class _Refusal(jinja2.TemplateError):
    """What a template says with raise_exception."""


class _Overrun(jinja2.TemplateError):
    """A template that does not end, or makes more than fits."""


def render(source: str, variables: Mapping[str, Any]) -> Traced:
    """The text of a template. TemplateError says which of the four things went wrong, and where in the template."""
    template = _compiled(source)
    token = _deadline.set(time.thread_time() + MAX_SECONDS)
    try:
        return joined([template.render(variables)])
    except _Refusal as error:
        raise TemplateError(f"the chat template refuses this conversation: {error}", HINT) from error
    except (_Overrun, TooLong) as error:
        raise TemplateError(f"the chat template was stopped: {error}", HINT) from error
    except Exception as error:  # a program from a file: anything can be wrong with it
        what = str(error) or type(error).__name__
        raise TemplateError(f"the chat template fails on this conversation: {what}", HINT) from error
    finally:
        _deadline.reset(token)


@functools.lru_cache(maxsize=32)
def free_variables(source: str) -> frozenset[str]:
    """Names that the template takes from whoever renders it. TemplateError where it cannot be compiled."""
    return frozenset(meta.find_undeclared_variables(_compiled(source).environment.parse(source)))


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}", HINT)
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template cannot be compiled: line {error.lineno}: {error.message}", HINT
        ) from error
    except Exception as error:  # nested deeper than Python's own compiler goes, say
        what = str(error) or type(error).__name__
        raise TemplateError(f"the chat template cannot be compiled: {what}", HINT) from error


def _tick() -> None:
    """Called in every loop, macro, filter and test."""
    if time.thread_time() > _deadline.get(float("inf")):
        raise _Overrun(f"it ran for more than {MAX_SECONDS:.0f} seconds")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise _Overrun(f"it asks for {value if abs(value) < 10**20 else 'a very large number'} of something")


class _Generator(CodeGenerator):
    """Compiles string literals and template text to traced strings."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if type(value) is str:
            self.write(f"environment.written({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.written({''.join(map(str, group))!r})"


class _Bounds(NodeTransformer):
    """Puts a tick into every body that can run again and again."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node


class _Generation(Extension):
    """transformers' {% generation %}: the assistant's own text, which is marked for training and otherwise plain."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(lineno)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    concat = staticmethod(joined)
    written = staticmethod(written)
    tick = staticmethod(_tick)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # The optimizer would fold literals into lists and other constants that the generator does not see.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.tests = {name: _bounded(name, function) for name, function in self.tests.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # random text of any length; no prompt holds it

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounds().visit(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = (list, tuple, str, bytes)
        if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
            many, n = (left, right) if isinstance(left, sized) else (right, left)
            if isinstance(n, int) and len(many) * n > MAX_LENGTH:
                raise _Overrun(f"it asks for {len(many)} times {n} of something")
        elif operator == "**" or (operator == "*" and isinstance(left, int) and isinstance(right, int)):
            _check_numbers((left, right))
            if operator == "**" and isinstance(right, int) and right > 64:
                raise _Overrun(f"it asks for a number to the power of {right}")
        elif operator == "+" and isinstance(left, (list, tuple)) and len(left) > MAX_NUMBER:
            raise _Overrun(f"it makes a list of more than {MAX_NUMBER} items")
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            _check_numbers(right if isinstance(right, tuple) else ())
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(__obj, "__self__", None), (str, bytes, int)):  # ljust, zfill, to_bytes ...
            _check_numbers((*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        plain = super().wrap_str_format(value)
        template = value.__self__ if plain is not None else None
        if plain is None or not isinstance(template, Traced) or set(origins_of(template)) != {TEMPLATE}:
            return plain

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_widths(template)
            text = str.__str__(plain(*args, **kwargs))
            pieces = _format_pieces(
                SandboxedFormatter(self),
                template,
                () if value.__name__ == "format_map" else args,
                args[0] if value.__name__ == "format_map" else kwargs,
            )
            return checked(text, pieces)

        return formatted


def _format_pieces(
    formatter: SandboxedFormatter, template: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterable[str]:
    """The literals and fields of a format string in order, each of its own origin."""
    n_auto = 0
    at = 0
    for literal, field, spec, conversion in formatter.parse(template):
        start = template.find(literal, at)
        yield template[start : start + len(literal)] if start >= 0 else literal
        at = max(start, at) + len(literal)
        if field is None:
            continue
        name = field
        if not field or field[0] in ".[":
            name, n_auto = f"{n_auto}{field}", n_auto + 1
        value = formatter.convert_field(formatter.get_field(name, args, kwargs)[0], conversion)
        yield value if isinstance(value, str) and not spec else formatter.format_field(value, spec or "")
        at = template.find("}", at) + 1 or at


def _check_widths(template: str) -> None:
    """Refuse a format that pads to any width: 20 characters of a template can ask for all memory."""
    run = ""
    for c in str.__str__(template) + " ":
        run = run + c if c.isdigit() else ""
        if len(run) > 6:
            raise _Overrun("it formats to a width of more than 6 digits")


def _bounded(name: str, function: Any) -> Callable[..., Any]:
    """A filter or test that counts as a step, and pads to no width past MAX_NUMBER."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _tick()
        if name in PADS:
            _check_numbers((*args[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return run


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' own: jinja2's escapes HTML. What it gives is of unknown origin."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's own, between which a traced string stands."""
    text: str = JOIN(context, value, joined([d]), attribute)
    return text


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    _check_widths(format)
    return written(datetime.now().strftime(format))


class _Dict:
    """transformers' ``dict``: no class, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """transformers' ``namespace``: names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")
