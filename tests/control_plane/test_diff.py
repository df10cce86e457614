"""Lines that differ, with those around them."""

from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure.diff import of_texts, of_values

TEXTS = st.lists(st.sampled_from("abc"), max_size=30).map("\n".join)


@given(TEXTS, TEXTS)
def test_the_lines_make_both_texts(before: str, after: str) -> None:
    lines = of_texts(before, after, None).lines

    assert [line.text for line in lines if line.kind != "added"] == before.splitlines()
    assert [line.text for line in lines if line.kind != "removed"] == after.splitlines()
    assert [line.before for line in lines if line.before] == list(range(1, len(before.splitlines()) + 1))


@given(TEXTS, TEXTS, st.integers(0, 3))
def test_a_fold_stands_for_equal_lines_only(before: str, after: str, context: int) -> None:
    whole, folded = of_texts(before, after, None), of_texts(before, after, context)

    changed = [line for line in whole.lines if line.kind != "same"]
    assert [line for line in folded.lines if line.kind in ("added", "removed")] == changed
    assert sum(line.stands_for for line in folded.lines) == len(whole.lines)


def test_a_changed_value_in_a_long_one() -> None:
    before = {"name": "llama", "backends": [f"http://10.0.0.{n}:8000" for n in range(20)], "weight": 1}
    found = of_values(before, before | {"weight": 2})

    assert [(line.sign, line.text) for line in found.lines] == [
        ("…", "21 equal lines"),
        (" ", '    "http://10.0.0.19:8000"'),
        (" ", "  ],"),
        (" ", '  "name": "llama",'),
        ("-", '  "weight": 1'),
        ("+", '  "weight": 2'),
        (" ", "}"),
    ]
    assert found.summary == "1 line added, 1 removed"


def test_what_was_not_there_before_is_added() -> None:
    found = of_values(None, {"name": "batch"})

    assert [line.kind for line in found.lines] == ["added"] * 3
    assert of_values({"a": 1, "b": 2}, {"b": 2, "a": 1}).summary == "no difference"


def test_long_texts_do_not_take_long() -> None:
    old = [f"{place}" for place in range(50_000)]
    new = [*old[:100], *(f"{place}!" for place in range(100, 49_900)), *old[49_900:]]

    found = of_texts("\n".join(old), "\n".join(new))

    assert (found.added, found.removed) == (49_800, 49_800)


def test_a_page_shows_it_as_text() -> None:
    found = of_texts("<b>", "<i>").__html__()

    assert '<span class="removed">- &lt;b&gt;</span><span class="added">+ &lt;i&gt;</span>' in found
    assert 'aria-label="1 line added, 1 removed"' in found
