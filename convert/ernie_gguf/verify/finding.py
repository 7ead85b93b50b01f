"""What a comparison gives: counts of some rows, and the verdict of a tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What comparing some rows gave; findings of a tensor add up.

    `explained` counts differing values that the type accounts for, `wrong` the others. `missed_rows` have no exact
    integer code map, `rounded_rows` a scale that f16 cannot hold. `square` and `square_error` are the sums of W² and
    (W - Ŵ)² of rows in a type of few bits, 0 of others.
    """

    values: int = 0
    explained: int = 0
    wrong: int = 0
    largest: float = 0.0
    relative: float = 0.0
    missed_rows: int = 0
    rounded_rows: int = 0
    square: float = 0.0
    square_error: float = 0.0
    problem: str = ""

    def __add__(self, other: "Finding") -> "Finding":
        return Finding(
            self.values + other.values,
            self.explained + other.explained,
            self.wrong + other.wrong,
            max(self.largest, other.largest),
            max(self.relative, other.relative),
            self.missed_rows + other.missed_rows,
            self.rounded_rows + other.rounded_rows,
            self.square + other.square,
            self.square_error + other.square_error,
            self.problem or other.problem,
        )


@dataclass(frozen=True)
class Verdict:
    """The result for one tensor. `exact`: its type holds the source's values, so nothing should differ."""

    name: str
    source: str
    type_name: str
    exact: bool
    finding: Finding

    @property
    def ok(self) -> bool:
        """Whether nothing differs beyond what the type explains."""
        return not self.finding.wrong and not self.finding.problem
