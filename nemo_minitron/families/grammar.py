"""The little language of a family table: shapes of tensors and arithmetic over config keys.

A row is a list of dimensions. Three operators only::

    row     = dim+ | "scalar"                   space: the next dimension; a tensor without any
    dim     = axis | "(" product { "|" product } ")"   bar: concatenation along the dimension
    product = axis+                             parentheses: a product of axes, slowest first
    axis    = a declared name, or a number for a dimension that is always as long

``(heads head_dim | kv_heads head_dim) hidden`` is a matrix whose rows are all query heads followed
by all key heads, each head ``head_dim`` long, and whose columns are the hidden channels.
"""

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Product = tuple[str, ...]
"""Axis names whose sizes multiply, slowest-varying first."""
Dim = tuple[Product, ...]
"""Products laid end to end along one dimension."""
Row = tuple[Dim, ...]
"""One ``Dim`` per dimension of the tensor; none for a scalar."""

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[1-9][0-9]*|[()|])")


def parse_row(text: str) -> Row:
    """Parses the right-hand side of a tensor row.

    Args:
        text: for instance ``"(heads head_dim) hidden"``.

    Returns:
        The dimensions, outermost first.

    Raises:
        ValueError: the text does not follow the grammar; the message quotes it.
    """
    tokens = _tokens(text)
    if tokens == ["scalar"]:
        return ()
    dims: list[Dim] = []
    while tokens:
        token = tokens.pop(0)
        if token == "(":
            dims.append(_parse_group(tokens, text))
        elif token in ")|":
            raise ValueError(f"row {text!r}: unexpected {token!r}")
        else:
            dims.append(((token,),))
    if not dims:
        raise ValueError("row is empty")
    return tuple(dims)


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise ValueError(
                f"row {text!r}: unexpected character {stripped[position:].lstrip()[0]!r}"
            )
        tokens.append(match.group(1))
        position = match.end()
    return tokens


def _parse_group(tokens: list[str], text: str) -> Dim:
    products: list[Product] = []
    axes: list[str] = []
    while tokens:
        token = tokens.pop(0)
        if token == "(":
            raise ValueError(f"row {text!r}: parentheses do not nest")
        if token not in (")", "|"):
            axes.append(token)
            continue
        if not axes:
            raise ValueError(f"row {text!r}: nothing before {token!r}")
        products.append(tuple(axes))
        axes = []
        if token == ")":
            return tuple(products)
    raise ValueError(f"row {text!r}: missing ')'")


def row_axes(row: Row) -> set[str]:
    """Names of all axes that a row mentions; plain numbers are skipped."""
    return {axis for dim in row for product in dim for axis in product if not axis.isdecimal()}


def extent(axis: str, sizes: Mapping[str, int]) -> int:
    """Size of one factor of a product: of the axis, or the number itself."""
    return int(axis) if axis.isdecimal() else sizes[axis]


def segments(dim: Dim, sizes: Mapping[str, int]) -> Iterator[tuple[Product, int, int]]:
    """Products along one dimension in turn: each with its first position and its length."""
    start = 0
    for product in dim:
        width = math.prod(extent(axis, sizes) for axis in product)
        yield product, start, width
        start += width


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Number of elements along one dimension, given the size of every axis."""
    return sum(width for _, _, width in segments(dim, sizes))


def row_shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a tensor, given the size of every axis."""
    return tuple(dim_size(dim, sizes) for dim in row)


def _divide(left: Any, right: Any) -> Any:
    quotient = left / right
    return int(quotient) if quotient == int(quotient) else quotient


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_CALLS: dict[str, Callable[[Any], Any]] = {"len": len, "str": str}


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """Evaluates an expression over named values.

    Only arithmetic, comparison, logic, indexing, ``len`` and ``str`` (a number as a JSON key).

    Args:
        expression: for instance ``"hidden_size / num_attention_heads"``, ``"not
            tie_word_embeddings"`` or ``"layer in mlp_only_layers"``.
        values: what the names stand for.

    Returns:
        Its value; a whole quotient is an ``int``.

    Raises:
        ValueError: a construct that is not allowed, a name without a value, or values that do not
            fit.
    """
    try:
        return _evaluate(_parse(expression).body, values, expression)
    except (ArithmeticError, TypeError, LookupError) as error:
        known = {name: values[name] for name in sorted(names_in(expression)) if name in values}
        given = ", ".join(f"{name}={value!r:.60}" for name, value in known.items())
        raise ValueError(f"expression {expression!r} cannot be computed with {given}") from error


@functools.lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.Expression:
    try:
        return ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"expression {expression!r} is not valid: {error.msg}") from error


def _evaluate(node: ast.expr, values: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name):
            if name not in values:
                raise ValueError(f"expression {text!r}: {name!r} has no value")
            return values[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, values, text), _evaluate(right, values, text))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_evaluate(left, values, text), _evaluate(right, values, text))
        case ast.UnaryOp() | ast.BoolOp() | ast.IfExp():
            return _decide(node, values, text)
        case ast.Subscript(value=container, slice=position):
            return _evaluate(container, values, text)[_evaluate(position, values, text)]
        case ast.List(elts=elements):
            return [_evaluate(element, values, text) for element in elements]
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CALLS:
            return _CALLS[name](_evaluate(argument, values, text))
    raise _refused(text)


def _decide(node: ast.expr, values: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, values, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, values, text)
        case ast.BoolOp(op=op, values=operands):
            for operand in operands:  # as in Python, the last operand looked at is the value
                value = _evaluate(operand, values, text)
                if bool(value) != isinstance(op, ast.And):
                    break
            return value
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, values, text) else orelse, values, text)
    raise _refused(text)


def _refused(text: str) -> ValueError:
    return ValueError(
        f"expression {text!r}: only arithmetic, comparison, logic, 'if else', indexing, len and str "
        "are allowed"
    )


def names_in(expression: str) -> set[str]:
    """Names that an expression mentions.

    Raises:
        ValueError: it does not parse.
    """
    names = {node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)}
    return names - _CALLS.keys()
