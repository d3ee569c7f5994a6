"""Make docs/report.png, the picture of a campaign's page in the README: `python -m tests.support.pictures`. It needs Debian's chromium.

The campaign is `told.reversal`: real plans, tests and decisions on simulated outcomes. The picture is the top of its page, beside that of a phone.
"""

import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.pages import write
from tests.support import told
from tests.support.browser import browser, why_not
from tests.support.paths import ROOT

PICTURE = ROOT / "docs" / "report.png"
MOST_BYTES = 250_000
DESKTOP, PHONE, HEIGHT = 1100, 390, 1420
GAP = 24


def picture(page: Path) -> bytes:
    """The top of a page as a desktop and as a phone show it, side by side, as PNG of at most 128 colours."""
    from PIL import Image

    found = []
    with browser() as chromium:
        for width, top in ((DESKTOP, 0), (PHONE, 1)):
            opened = chromium.new_page(
                viewport={"width": width, "height": HEIGHT}, color_scheme="dark" if top else "light"
            )
            opened.goto(page.as_uri())
            if top:  # the phone shows what the desktop has further below
                opened.evaluate("document.querySelector('#evidence-against-thresholds ~ .charts').scrollIntoView()")
            found.append(Image.open(BytesIO(opened.screenshot())).convert("RGB"))
    whole = Image.new("RGB", (DESKTOP + PHONE + 3 * GAP, HEIGHT + 2 * GAP), "#d0d7de")
    for image, left in zip(found, (GAP, DESKTOP + 2 * GAP), strict=True):
        whole.paste(image, (left, GAP))
    out = BytesIO()
    # Median cut would spend its colours on greys; the octree keeps those of the marks.
    whole.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        out, format="PNG", optimize=True
    )
    return out.getvalue()


def main() -> int:
    if why := why_not():
        print(f"no picture: {why}", file=sys.stderr)
        return 1
    with TemporaryDirectory() as folder:
        campaign = Campaign.at(told.reversal(Path(folder) / "reversal"))
        page = Path(folder) / "report.html"
        page.write_text(write.campaign_page(Log(campaign.log).records(), campaign))
        content = picture(page)
    if len(content) > MOST_BYTES:
        print(f"the picture has {len(content):,} bytes, more than {MOST_BYTES:,}", file=sys.stderr)
        return 1
    PICTURE.write_bytes(content)
    print(f"{PICTURE} has {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
