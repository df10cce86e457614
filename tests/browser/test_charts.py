"""Charts as a browser lays them out: no label on another or outside of the page, no shape outside of its plot."""

import pytest
from playwright.sync_api import Browser

from control_plane import web
from control_plane.pure import charts
from control_plane.pure.charts import Bar, Series

MINUTE, DAY = 60_000, 86_400_000
END = 1_795_867_200_000 + 17 * MINUTE
SPANS = (5 * MINUTE, 60 * MINUTE, 180 * MINUTE, 720 * MINUTE, DAY, 2 * DAY, 7 * DAY, 30 * DAY, 365 * DAY)
# Pairs of labels that touch, and labels beyond the page
TOUCHING = """() => [...document.querySelectorAll("figure")].flatMap((figure) => ["x", "y"].flatMap((axis) => {
  const labels = [...figure.querySelectorAll(`text.axis.${axis}`)].filter((one) => one.getClientRects().length);
  const boxes = labels.map((one) => one.getBoundingClientRect());
  const where = `${figure.querySelector(".chart-title").textContent} at ${innerWidth}`;
  return boxes.flatMap((box, at) => [
    ...(box.left < 0 || box.right > innerWidth ? [`${where}: ${labels[at].textContent} is outside`] : []),
    ...(at && (axis === "x" ? boxes[at - 1].right + 3 > box.left : box.bottom - 2 > boxes[at - 1].top)
      ? [`${where}: ${labels[at - 1].textContent} touches ${labels[at].textContent}`] : []),
  ]);
}))"""
BEYOND = """() => [...document.querySelectorAll("svg.shapes path.line, svg.shapes path.area, svg.lane rect")]
  .filter((shape) => {
    const [inner, outer] = [shape, shape.ownerSVGElement].map((one) => one.getBoundingClientRect());
    return inner.left < outer.left - 2 || inner.right > outer.right + 2 ||
      inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
  }).map((shape) => shape.outerHTML)"""


def gallery() -> str:
    """A page of charts of all spans: columns, and lines whose labels are long."""
    found = []
    for span in SPANS:
        bucket = charts.bucket_of(END - span, END)
        times = charts.buckets(END - span, END, bucket)
        values = tuple(place * 98_765.4 for place, _ in enumerate(times))
        for draw in (charts.columns, charts.lines):
            found.append(draw(times, [Series("a", values)], title=f"{span // MINUTE} min", bucket_ms=bucket))
    bars = [Bar("10.0.0.11:8000", "no connection", "failed", 0, 2), Bar("a" * 200, "answered", "ok", 2, 9_998, 400)]
    found.append(charts.waterfall(bars, 10_000, title="Attempts"))
    style = web.assets()["console.css"].body.decode()
    return f"<!doctype html><title>x</title><style>{style}</style><main><div class='panel body'>{''.join(found)}</div>"


@pytest.mark.parametrize("width", [390, 540, 640, 700, 1280])
def test_labels_have_room_and_shapes_stay_inside(browser: Browser, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    try:
        page.set_content(gallery())

        assert page.locator("figure text.axis.x:visible").count() > 3 * len(SPANS)
        assert page.evaluate(TOUCHING) == []
        assert page.evaluate(BEYOND) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.close()
