"""Draws emoji from their vector files: emoji64.npz (n, 64, 64, 3) uint8 on white, and emoji64.json with names and tags.

    python demos/train/rasterize.py --out build/emoji

Fetches five packages with `npm pack` (Apache-2.0 and MIT), reads them without running anything of theirs, and renders
with resvg_py. Versions are pinned so that a second run gives the same pictures. Two CPU minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np

SIDE = 64
MARGIN = 2
STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "blob": "@iconify-json/noto-v1@1.2.5",
}
NAMES = "emojibase-data@17.0.0"
GROUPS = {0: "smileys", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji"))
    parser.add_argument("--limit", type=int, help="at most so many names, to try the script")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    emoji = {slug(e["label"]): e for e in read(NAMES, "en/data.json", args.out) if e.get("group") in GROUPS}
    emoji = dict(list(emoji.items())[: args.limit])
    pictures, about = [], []
    for style, package in STYLES.items():
        icons = read(package, "icons.json", args.out)
        for name, entry in emoji.items():
            svg = svg_of(icons, name)
            if svg is None:
                continue
            pictures.append(render(svg))
            about.append(
                {"name": entry["label"], "style": style, "group": GROUPS[entry["group"]], "tags": entry.get("tags", [])}
            )
        print(f"{style}: {sum(a['style'] == style for a in about)} pictures")
    np.savez_compressed(args.out / "emoji64.npz", images=np.stack(pictures))
    (args.out / "emoji64.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    print(f"{len(pictures)} pictures of {len({a['name'] for a in about})} names in {args.out}")


def read(package: str, member: str, folder: Path) -> dict | list:
    """One JSON file of an npm package, fetched once into `folder`."""
    archive = folder / (re.sub(r"[^a-z0-9.]+", "-", package).strip("-") + ".tgz")
    if not archive.exists():
        report = subprocess.run(
            ["npm", "pack", package, "--json", "--silent", "--ignore-scripts", "--pack-destination", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        (folder / Path(json.loads(report.stdout)[0]["filename"]).name).rename(archive)
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


def slug(name: str) -> str:
    """The icon sets' spelling of a Unicode name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "").replace("'", "")).strip("-")


def svg_of(icons: dict, name: str) -> str | None:
    """The drawing of a name, also where the set knows it under another one; None if it has none."""
    if name not in icons["icons"]:
        name = icons.get("aliases", {}).get(name, {}).get("parent", "")
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )


def render(svg: str) -> np.ndarray:
    """(64, 64, 3) uint8: drawn at 256 pixels on white, reduced, with a margin of two pixels."""
    import resvg_py
    from PIL import Image

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    white.alpha_composite(drawn)
    inner = SIDE - 2 * MARGIN
    picture = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    picture.paste(white.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    return np.asarray(picture)


if __name__ == "__main__":
    main()
