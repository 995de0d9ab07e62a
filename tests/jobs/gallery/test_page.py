"""Gallery pages, parsed as a browser would: tags balanced, attributes decoded."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
from gallery_images import LENGTHS, gallery_image, plain_image
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.gallery.contents import DatasetSummary, GalleryImage
from jobs.gallery.page import render

VOID = {"meta", "link", "img", "input"}

SVG_LEAVES = {"line", "rect", "circle"}

NASTY = '<b onmouseover="x()">&amp;\'"\nline\tტ\u202e\ud800\x00</b><script>'


class Page(HTMLParser):
    """Collects tags and texts, and refuses what is not nested properly."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (the innermost tag, its text)
        self.open: list[str] = []
        source.encode()  # raises where a lone surrogate is left
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_LEAVES, f"<{tag}/> is not closed in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, css_class: str | None = None) -> list[dict[str, str | None]]:
        return [
            a for t, a in self.tags if t == tag and (css_class is None or css_class in (a.get("class") or "").split())
        ]

    def text(self, tag: str) -> list[str]:
        return [data for t, data in self.texts if t == tag]

    @property
    def visible(self) -> str:
        return " ".join(data for tag, data in self.texts if tag not in ("script", "style"))


def summary(**changes: object) -> DatasetSummary:
    values = {
        "title": "Photographs",
        "criterion": "l1:0.05",
        "higher_is_better": False,
        "threshold": 0.05,
        "images": 1234,
        "rejects": 2,
        "mean_tokens": 43.25,
        "histogram": {16: 34, 48: 1200},
        "bits_per_token": 12.0,
        "images_per_second": 87.6,
        "fingerprint": "9f2c1a",
        "dataset": "s3://bucket/tokens",
        "facts": {"machine": "2 cores"},
    }
    return DatasetSummary(**(values | changes))  # type: ignore[arg-type]


def test_page_shows_all_measurements() -> None:
    """The page shows the facts of the dataset, and every length and score of every image."""
    page = Page(render(summary(), [gallery_image(), gallery_image("slug.jpg", chosen=3, satisfied=False)]))
    for told in (
        "1,234",
        "43.2",
        "87.6",
        "9f2c1a",
        "s3://bucket/tokens",
        "2 cores",
        "500 \N{MULTIPLICATION SIGN} 375",
        "at most 0.05",
    ):
        assert told in page.visible, told
    assert page.text("b").count("original") == 2
    for length in LENGTHS:
        assert page.text("b").count(str(length)) == 2
    for score in ("0.210", "0.120", "0.0434", "0.0311"):
        assert page.text("span").count(score) == 2
    assert page.visible.count("threshold not met") == 1


def test_page_loads_nothing_from_elsewhere() -> None:
    """The page refers to no address outside itself, and its security policy forbids it."""
    source = render(summary(dataset="https://host/x"), [gallery_image()], [("a", "empty", "https://host/y")])
    page = Page(source)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value)
    styles = "".join(page.text("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_page_embeds_every_image_with_a_description() -> None:
    """Every image is embedded in the page and has an alternative text."""
    page = Page(render(summary(), [gallery_image()]))
    images = page.all("img")
    assert len(images) == 1 + 1 + len(LENGTHS)  # the large one, then the row
    for attributes in images:
        assert attributes["alt"]
        assert (attributes["src"] or "").startswith("data:image/png;base64,")


@pytest.mark.parametrize("kind", ["PNG", "WebP", "JPEG"])
def test_page_names_the_format_of_its_images(kind: str) -> None:
    """Embedded images carry the media type of their format."""
    one = GalleryImage(
        id="a",
        original=plain_image(1, kind),
        reconstructions=(plain_image(2, kind),),
        lengths=(64,),
        chosen=0,
        satisfied=True,
        width=1,
        height=1,
    )
    images = Page(render(summary(), [one])).all("img")
    assert all((a["src"] or "").startswith(f"data:image/{kind.lower()};base64,") for a in images)


def test_page_refuses_other_image_formats() -> None:
    """Bytes of another image format are refused and quoted."""
    one = GalleryImage(
        id="a",
        original=b"GIF89a",
        reconstructions=(plain_image(2),),
        lengths=(64,),
        chosen=0,
        satisfied=True,
        width=1,
        height=1,
    )
    with pytest.raises(ValueError, match="GIF89a"):
        render(summary(), [one])


@pytest.mark.parametrize("chosen", range(len(LENGTHS)))
def test_page_marks_the_chosen_length_once(chosen: int) -> None:
    """The chosen length is marked once in the row, the captions and the chart of an image."""
    page = Page(render(summary(), [gallery_image(chosen=chosen), gallery_image()]))
    assert len(page.all("article")) == 2
    assert len(page.all("label", "chosen")) == 2
    assert page.text("strong") == ["chosen", "chosen"]
    captions = [a["data-caption"] or "" for a in page.all("input")][: 1 + len(LENGTHS)]
    assert [c.endswith(", chosen") for c in captions] == [False] + [k == chosen for k in range(len(LENGTHS))]
    assert len(page.all("circle", "pick")) == 2


def test_page_escapes_text() -> None:
    """Markup and unprintable characters in names stay text."""
    clean = NASTY.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    facts = summary(title=NASTY, criterion=NASTY, fingerprint=NASTY, dataset=NASTY, facts={NASTY: NASTY})
    source = render(facts, [gallery_image(NASTY)], [(NASTY, NASTY, NASTY)])
    page = Page(source)
    assert page.text("h1") == page.text("title")[:1] == [clean]
    assert page.text("bdi") == [clean, clean]
    assert len(page.all("script")) == 1
    assert not any("onmouseover" in attributes for _, attributes in page.tags)
    assert page.all("img")[0]["alt"] == f"{clean}, the original"


@settings(max_examples=30, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=())),
    scores=st.lists(st.none() | st.floats(width=32), min_size=4, max_size=4),
    threshold=st.none() | st.floats(-100, 100) | st.just(math.nan),
    higher=st.booleans(),
    chosen=st.integers(0, 3),
)
def test_page_accepts_any_name_and_score(name, scores, threshold, higher, chosen) -> None:
    """Any name, score and threshold make a well-formed page with finite coordinates."""
    facts = summary(threshold=threshold, higher_is_better=higher)
    page = Page(render(facts, [gallery_image(name, scores=tuple(scores), chosen=chosen)], [(name, "empty", name)]))
    numbers = [
        value for tag, a in page.tags if tag in SVG_LEAVES for key, value in a.items() if key in ("cx", "cy", "y", "y1")
    ]
    assert all(math.isfinite(float(value or "nan")) for value in numbers)


def test_page_draws_finite_scores_only() -> None:
    """Missing and infinite scores are written as words and not drawn."""
    page = Page(render(summary(), [gallery_image(scores=(math.nan, math.inf, None, 0.02), chosen=3)]))
    assert page.text("span") == ["no score", "∞", "no score", "0.0200"]
    assert len(page.all("circle", "dot")) == 1
    assert page.all("line", "curve") == []
    assert "nan" not in page.visible


def test_page_of_fixed_lengths_has_no_scores() -> None:
    """The page of a dataset with a fixed length mentions neither thresholds nor scores."""
    facts = summary(criterion="fixed:48", threshold=None, histogram={48: 1234})
    page = Page(render(facts, [gallery_image(scores=(), satisfied=False)]))
    assert "fixed:48" in page.visible
    assert page.text("strong") == ["chosen"]
    assert page.all("circle") == []
    assert "threshold" not in page.visible
    assert "score" not in page.visible


def test_page_without_images_explains_itself() -> None:
    """A dataset without images makes a page that says so."""
    page = Page(render(summary(images=0, histogram={}, mean_tokens=math.nan), []))
    assert page.all("article") == page.all("img") == page.all("table") == []
    assert "No photograph was tokenized" in page.visible
    assert "nan" not in page.visible


def test_page_lists_rejects() -> None:
    """The page lists rejected files with reason and message, where there are any."""
    rejects = [("a.jpg", "truncated", "ends early"), ("b.jpg", "empty", "no bytes")]
    page = Page(render(summary(), [], rejects))
    cells = page.text("td")
    assert page.text("bdi") == ["a.jpg", "b.jpg"]
    for told in ("truncated", "ends early", "empty", "no bytes"):
        assert told in cells
    assert "Rejected files" not in Page(render(summary(), [])).text("h2")


def test_histogram_counts_every_length() -> None:
    """The histogram shows the count and share of every length, in bars of proportional height."""
    page = Page(render(summary(), [gallery_image()]))
    assert page.text("td") == ["16", "34", "2.8%", "32", "0", "0.0%", "48", "1,200", "97.2%", "64", "0", "0.0%"]
    bars = [float(a["height"] or "nan") for a in page.all("rect", "bar")]
    assert bars[1] == bars[3] == 0
    assert bars[0] / bars[2] == pytest.approx(34 / 1200, abs=0.001)
    assert "16 tokens: 34 photographs; 32 tokens: 0 photographs" in page.text("desc")[0]


def test_page_ranks_by_name_tokens_and_score() -> None:
    """Every image carries its rank by name, number of tokens and score, for the script to sort by."""
    pictures = [
        gallery_image("b", chosen=3),
        gallery_image("c", chosen=0, scores=(math.nan,) * 4),
        gallery_image("a", chosen=2, scores=(0.9, 0.8, 0.01, 0.02)),
    ]

    def order(key: str, **changes: object) -> list[int]:
        cards = Page(render(summary(**changes), pictures)).all("article")
        return sorted(range(3), key=lambda i: int(cards[i][f"data-{key}"] or ""))

    assert order("shown") == [0, 1, 2]
    assert order("id") == [2, 0, 1]
    assert order("fewest") == [1, 2, 0]
    assert order("most") == [0, 2, 1]
    assert order("score") == [2, 0, 1]  # without a score comes last
    assert order("score", higher_is_better=True) == [0, 2, 1]


def test_page_works_without_its_script() -> None:
    """Without the script, the page hides nothing but the tools that need it."""
    page = Page(render(summary(), [gallery_image()]))
    hidden = [(tag, a.get("class")) for tag, a in page.tags if "hidden" in a]
    assert hidden == [("div", "tools")]


def test_page_has_unique_ids_and_valid_references() -> None:
    """Ids are unique, and labels refer to existing ids."""
    page = Page(render(summary(), [gallery_image(), gallery_image()]))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = " ".join(a["aria-labelledby"] or "" for _, a in page.tags if "aria-labelledby" in a).split()
    assert set(named) <= set(ids)
    groups = {a["name"] for a in page.all("input")}
    assert len(groups) == 2
    assert all(a["aria-label"] for a in page.all("input"))


def test_page_is_deterministic() -> None:
    """The same arguments give the same page."""
    first = render(summary(), [gallery_image()], [("a", "empty", "")])
    assert first == render(summary(), [gallery_image()], [("a", "empty", "")])
    assert not re.search(r"0x[0-9a-f]{6}", first)
