"""Numbers of a forward pass as arithmetic of the sizes it meets: found by comparing captures at several sizes.

A number is tried as a size, as a product of sizes over a number, as one with a number added or taken away, divided
and rounded down or up, as the padding to a multiple, as that multiple, and as a product of two such counts. What is
found holds in every capture.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from secateur.rewriting.program import Dim, Number, Size

LARGEST_DIVISOR = 64
"""Largest divisor that is tried unless the forward names it."""

Column = tuple[int, ...]
"""A number, or a size, in every capture."""


@dataclass(frozen=True)
class Expressions:
    """What numbers may be expressed by.

    Attributes:
        symbols: a size or a number among the arguments -> its value in every capture; the likeliest first.
        literals: numbers that the forward names.
    """

    symbols: Mapping[Dim, Column]
    literals: Sequence[int] = ()

    def of(self, column: Column, after: int) -> Number | None:
        """The number as arithmetic of sizes; None if nothing fits.

        Args:
            column: the number in every capture.
            after: the first of them after a cut, which may change it in proportion.
        """
        if after != column[0]:
            return next(self._products(column, after), None)
        return next(self._all(column), None)

    def _all(self, column: Column) -> Iterator[Number]:
        yield from (symbol for symbol, sizes in self.symbols.items() if sizes == column)
        yield from self._products(column, column[0])
        yield from self._shifted(column)
        yield from self._divided(column)
        yield from self._padding(column)
        for m in self._divisors():
            if all(n % m == 0 for n in column):
                for quotient in self._divided(tuple(n // m for n in column), (m,)):
                    yield Size("*", quotient, m)
        for a, b in itertools.combinations(self._counts(), 2):
            sizes = tuple(x * y for x, y in zip(a[1], b[1], strict=True))
            yield from (over(times(Size("*", a[0], b[0]), k), per) for k, per in [ratio(column, sizes)] if k)

    def _products(self, column: Column, after: int) -> Iterator[Number]:
        """A number of times one size, or the product of several, over a number."""
        for count in (1, 2, 3):
            for dims in itertools.combinations(self.symbols, count):
                sizes = self._product(dims)
                if ratio(column, sizes)[0]:
                    common = math.gcd(after, sizes[0])
                    number: Number = dims[0]
                    for dim in dims[1:]:
                        number = Size("*", number, dim)
                    yield over(times(number, after // common), sizes[0] // common)

    def _shifted(self, column: Column) -> Iterator[Number]:
        """A size, a few times a size, or a product of two, plus a number."""
        for times_ in (1, 2, -1):
            for symbol, sizes in self.symbols.items():
                rest = {n - times_ * s for n, s in zip(column, sizes, strict=True)}
                if len(rest) == 1:
                    yield plus(times(symbol, times_), rest.pop())
        for a, b in itertools.combinations(self.symbols, 2):
            rest = {n - s for n, s in zip(column, self._product((a, b)), strict=True)}
            if len(rest) == 1:
                yield plus(Size("*", a, b), rest.pop())
            for sign in (1, -1):
                pairs = zip(column, self.symbols[a], self.symbols[b], strict=True)
                rest = {n - x - sign * y for n, x, y in pairs}
                if len(rest) == 1:
                    yield plus(Size("+", a, times(b, sign)), rest.pop())

    def _divided(self, column: Column, divisors: Sequence[int] = ()) -> Iterator[Number]:
        """(size + b) // c: what is rounded down or up comes first, by a number that the forward names.

        Then comes what is rounded and shifted, by a power of two before others: networks halve images, and over a few
        sizes many another number fits as well.
        """
        named, others = self._divisors(named=True), sorted(self._divisors(), key=lambda c: c & (c - 1) != 0)
        for kind, choice in (("rounded", named), ("shifted", others), ("any", named), ("any", others)):
            for c in divisors or choice:
                for symbol, sizes in self.symbols.items():
                    least = max(n * c - s for n, s in zip(column, sizes, strict=True))
                    most = min(n * c + c - 1 - s for n, s in zip(column, sizes, strict=True))
                    shifted = [most // c * c, (most + 1) // c * c - 1]
                    shifts = {"rounded": [0, c - 1], "shifted": shifted, "any": [most]}[kind]
                    yield from (over(plus(symbol, b), c) for b in shifts if least <= b <= most)

    def _padding(self, column: Column) -> Iterator[Number]:
        """(b - size) % c."""
        for c in self._divisors():
            if max(column) < c and min(column) >= 0:
                for symbol, sizes in self.symbols.items():
                    rest = {(n + s) % c for n, s in zip(column, sizes, strict=True)}
                    if len(rest) == 1:
                        yield Size("%", plus(times(symbol, -1), rest.pop()), c)

    def _counts(self) -> Iterator[tuple[Number, Column]]:
        """How many whole or begun runs of a number that the forward names a size holds."""
        for c in self._divisors(named=True):
            for symbol, sizes in self.symbols.items():
                for shift in (0, c - 1):
                    yield over(plus(symbol, shift), c), tuple((s + shift) // c for s in sizes)

    def _divisors(self, named: bool = False) -> list[int]:
        first = [n for n in self.literals if 1 < n <= 4096]
        return first if named else [*first, *(n for n in range(2, LARGEST_DIVISOR + 1) if n not in first)]

    def _product(self, dims: Sequence[Dim]) -> Column:
        columns = zip(*(self.symbols[dim] for dim in dims), strict=True)
        return tuple(math.prod(sizes) for sizes in columns)


def ratio(column: Column, sizes: Column) -> tuple[int, int]:
    """The number that every entry of one column is times those of the other, as (numerator, denominator).

    >>> ratio((6, 9), (4, 6)), ratio((6, 9), (4, 5))
    ((3, 2), (0, 1))
    """
    if not sizes[0] or not column[0]:
        return 0, 1
    if any(n * sizes[0] != s * column[0] for n, s in zip(column, sizes, strict=True)):
        return 0, 1
    common = math.gcd(column[0], sizes[0])
    return column[0] // common, sizes[0] // common


def plus(number: Number, shift: int) -> Number:
    """The number plus a constant."""
    return Size("+", number, shift) if shift else number


def times(number: Number, factor: int) -> Number:
    """The number times a constant."""
    return Size("*", number, factor) if factor != 1 else number


def over(number: Number, divisor: int) -> Number:
    """The number over a constant, rounded down."""
    return Size("//", number, divisor) if divisor != 1 else number
