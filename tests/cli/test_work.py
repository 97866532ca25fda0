import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka.cli.work import RowWindow, Work


class Sum(Work):
    """Refuses rows that are "refused", and windows of more than `most` rows."""

    result = "sum"
    reranker = None
    most = 100
    as_row = pairs = kept = staticmethod(lambda row: row)

    def results(self, reranker, rows):
        if len(rows) > self.most:
            raise ValueError("too many rows")
        for place, row in enumerate(rows):
            if row["value"] == "refused":
                raise ValueError(f"value {place} is refused")
        return [row["value"] for row in rows]


@given(st.lists(st.sampled_from([1, 2, "refused"]), min_size=1, max_size=20), st.integers(0, 9))
def test_the_error_names_the_first_row_that_is_refused(values, start):
    work, window = Sum("model", {}, {}), RowWindow(start, [{"value": value} for value in values])
    if "refused" not in values:
        assert work.run(window).of_rows == values
        return
    with pytest.raises(
        ValueError, match=f"^row {start + values.index('refused') + 1} of the input: value 0 is refused$"
    ):
        work.run(window)


def test_rows_that_are_refused_only_together_are_all_named():
    work = Sum("model", {}, {})
    work.most = 3
    with pytest.raises(ValueError, match=r"^rows 3 to 6 of the input: too many rows$"):
        work.run(RowWindow(2, [{"value": 1}] * 4))
