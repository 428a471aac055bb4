"""Rows by number are the same rows, whether they come from one source, from several as one, or are some of one."""

from __future__ import annotations

import numpy as np

from dpf_release.bank.rows import ComputedRows, Concat, Select
from rows_in_memory import rows_of

ONE, TWO, NONE = rows_of([0, 1, 2], (2, 3, 3)), rows_of([3, 4], (2, 3, 3), seed=1), rows_of([], (2, 3, 3))
ALL = np.concatenate([ONE.features, TWO.features])


def test_several_sources_are_numbered_through_in_any_order_and_with_repeats() -> None:
    joined = Concat([ONE, NONE, TWO])
    rows = np.array([4, 0, 3, 3, 2])
    assert len(joined) == 5
    assert joined.targets.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(joined.ids, np.concatenate([ONE.ids, TWO.ids]))
    assert np.array_equal(joined.read(rows), ALL[rows])
    assert not np.array_equal(joined.read(rows), ALL[rows[::-1]])
    assert joined.read(np.empty(0, np.int64)).shape == (0, 2, 3, 3)


def test_rows_are_split_by_the_source_that_they_are_of() -> None:
    rows = np.array([4, 0, 3, 2])
    parts = list(Concat([ONE, NONE, TWO]).split(rows))
    assert [(number, places.tolist(), mine.tolist()) for number, places, mine in parts] == [
        (0, [1, 3], [0, 2]),
        (2, [0, 2], [1, 0]),
    ]


def test_chosen_rows_are_numbered_anew() -> None:
    some = Select(Concat([ONE, TWO]), np.array([4, 1]))
    assert len(some) == 2
    assert some.targets.tolist() == [4, 1]
    assert np.array_equal(some.read(np.array([1, 0])), ALL[[1, 4]])
    assert np.array_equal(some.ids[0], TWO.ids[1])


def test_computed_rows_have_ids_of_their_own_that_stay() -> None:
    asked: list[list[int]] = []

    def compute(rows: np.ndarray) -> np.ndarray:
        asked.append(rows.tolist())
        return ALL[rows]

    rows = ComputedRows(np.arange(5), compute)
    assert np.array_equal(rows.read(np.array([2, 2])), ALL[[2, 2]])
    assert asked == [[2, 2]]
    assert np.array_equal(rows.ids, ComputedRows(np.arange(5), compute).ids)
    assert len({row_id.tobytes() for row_id in rows.ids}) == 5
