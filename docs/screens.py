"""Draw docs/figures/phone.png, three screens of the page on an emulated phone: python docs/screens.py

An example of a federation whose model is the zoo's mlp, with three classes of pictures: what happens to the data, the
camera, and what was contributed, in German and dark. The colors are reduced to a palette, as a page has few.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from emulated_phone import SETTINGS, Phone, ask, collecting  # noqa: E402
from phone_tools import WEB, run_node  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "phone.png"
SCREEN = (360, 780)
GAP, GRAY, COLORS = 20, 136, 64
CLASSES = ("boot", "sandal", "trousers")
LOOKS = ("data", "camera", "contributed")


def photograph(folder: Path) -> list[Path]:
    """Pictures of the screens, by what a person does on the phone."""
    pictures = {look: folder / f"{look}.png" for look in LOOKS}
    run_node(WEB / "build.mjs", folder / "page", "--compress")
    with collecting(folder / "page", folder, name="mlp", class_names=CLASSES, input_shape=(3, 16, 16)) as (site, _):
        ask(site, {**SETTINGS, "epochs": 6, "codec": "int4"})
        shots = [(("choose", name), ("tap", "shutter"), ("untilText", ["counts", name])) for name in CLASSES * 2]
        Phone(folder / "profile", folder, site.url).do_alone(
            *(("open", site.url), ("screen", SCREEN), ("until", "ready"), ("photograph", f"{pictures['data']}")),
            *(("tap", "camera"), *(action for shot in shots for action in shot)),
            *(("show", "giving"), ("photograph", f"{pictures['camera']}")),
            *(("tap", "start"), ("until", "done"), ("tap", "send"), ("untilText", ["contributions", "kB"])),
            *(("select", ["language", "de"]), ("prefer", {"colorScheme": "dark"})),
            *(("show", "clear"), ("photograph", f"{pictures['contributed']}")),
        )
    return list(pictures.values())


@click.command(help=__doc__)
def main() -> None:
    """Replace the figure."""
    with TemporaryDirectory() as folder:
        screens = [Image.open(path).convert("RGB").resize(SCREEN) for path in photograph(Path(folder))]
    figure = Image.new("RGB", (len(screens) * (SCREEN[0] + GAP) - GAP, SCREEN[1]), (GRAY, GRAY, GRAY))
    for number, screen in enumerate(screens):
        figure.paste(screen, (number * (SCREEN[0] + GAP), 0))
    figure.quantize(COLORS).save(FIGURE, optimize=True)


if __name__ == "__main__":
    main()
