"""Build the bundled emoji set from its source packages.

    npm pack emoji-datasource@16 emoji-datasource-google@16 emoji-datasource-twitter@16
    python scripts/build_emoji.py --source . --out vistok/data/emoji

Takes under a minute on one core and writes about 3.5 MB: one WebP atlas a style (`noto.webp`, `twemoji.webp`), `emoji.json` (names,
categories, positions, splits) and the credits; LICENSE-noto.txt, the text of the Apache License 2.0, lies there already. Base emoji only:
no flags (they are exempt from the Noto licence), no components, no skin tones. The result depends on the packages and on the WebP encoder
alone.
"""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

TILE = 64
"""Pixels per side of one emoji."""
COLUMNS = 41
"""Emoji per row of an atlas; 1,636 emoji make 40 rows."""
WEBP_QUALITY = 90
STYLES = {"noto": "google", "twemoji": "twitter"}
"""Our style name -> name of the vendor in the packages."""
LEFT_OUT = {"Flags", "Component"}

ATTRIBUTION = """The emoji set of vistok: {count} emoji in two styles, {tile} x {tile} pixels, composited on white and stored as WebP.

noto.webp     Noto Emoji, Copyright Google LLC. Licensed under the Apache License, Version 2.0 (LICENSE-noto.txt).
              https://github.com/googlefonts/noto-emoji
              Flags are left out.
twemoji.webp  Twemoji, Copyright 2019 Twitter, Inc and other contributors. Graphics licensed under the
              Creative Commons Attribution 4.0 International licence (CC-BY-4.0), LICENSE-twemoji.txt.
              https://github.com/jdecked/twemoji
emoji.json    Names and categories from emoji-datasource, Copyright (c) 2013 Cal Henderson, MIT (LICENSE-metadata.txt).
              https://github.com/iamcal/emoji-data

Changes to the images: the 64-pixel PNG files of the packages emoji-datasource-google and emoji-datasource-twitter (version {version}) were
composited on a white background, packed into one picture a style and compressed with WebP at quality {quality}.
"""

LICENSE_TWEMOJI = """Twemoji graphics

Copyright 2019 Twitter, Inc and other contributors.
The graphics are licensed under the Creative Commons Attribution 4.0 International licence (CC-BY-4.0):
https://creativecommons.org/licenses/by/4.0/legalcode

You are free to share and adapt the material for any purpose, even commercially, if you give appropriate credit, provide a link to the
licence and indicate if changes were made. The changes made here are listed in ATTRIBUTION.txt.
"""


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def find_package(source: Path, name: str) -> Path:
    found = sorted(path for path in source.glob(f"{name}-*.tgz") if path.name[len(name) + 1 :][0].isdigit())
    if not found:
        raise SystemExit(f"{source} holds no {name}-*.tgz; run `npm pack {name}@16` there")
    return found[-1]


def read_images(package: Path, vendor: str) -> dict[str, Image.Image]:
    """File name -> RGB image on white, for every 64-pixel picture of one vendor."""
    prefix, images = f"package/img/{vendor}/64/", {}
    with tarfile.open(package) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix):
                picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                images[member.name[len(prefix) :]] = Image.alpha_composite(white, picture).convert("RGB")
    return images


def held_out_style(name: str) -> str | None:
    """The style in which this emoji is held out of the composition split: one style of a fifth of the names, so a tenth of the images."""
    if fraction(f"composition:{name}") >= 0.2:
        return None
    return sorted(STYLES)[int(fraction(f"composition-style:{name}") * len(STYLES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the three npm tarballs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, normally vistok/data/emoji")
    options = parser.parse_args()
    with tarfile.open(find_package(options.source, "emoji-datasource")) as archive:
        table = json.load(archive.extractfile("package/emoji.json"))
        version = json.load(archive.extractfile("package/package.json"))["version"]
        metadata_license = archive.extractfile("package/LICENSE").read().decode()
    pictures = {style: read_images(find_package(options.source, f"emoji-datasource-{vendor}"), vendor) for style, vendor in STYLES.items()}
    kept = [row for row in table if row["category"] not in LEFT_OUT and all(row["image"] in images for images in pictures.values())]
    kept.sort(key=lambda row: row["sort_order"])

    options.out.mkdir(parents=True, exist_ok=True)
    rows = -(-len(kept) // COLUMNS)
    for style, images in pictures.items():
        atlas = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
        for i, row in enumerate(kept):
            atlas.paste(images[row["image"]].resize((TILE, TILE)), (i % COLUMNS * TILE, i // COLUMNS * TILE))
        atlas.save(options.out / f"{style}.webp", quality=WEBP_QUALITY, method=6)

    emoji = []
    for i, row in enumerate(kept):
        name = row["name"].lower()
        emoji.append(
            {
                "name": name,
                "code": row["unified"],
                "category": row["category"],
                "subcategory": row["subcategory"],
                "row": i // COLUMNS,
                "column": i % COLUMNS,
                "split": "test" if fraction(f"name:{name}") < 0.1 else "train",
                "held_out_style": held_out_style(name),
            }
        )
    header = {"tile": TILE, "columns": COLUMNS, "styles": sorted(STYLES), "source": f"emoji-datasource {version}"}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in emoji)
    (options.out / "emoji.json").write_text(json.dumps(header)[:-1] + f', "emoji": [\n{lines}\n]}}\n', encoding="utf-8")
    notice = ATTRIBUTION.format(count=len(kept), tile=TILE, version=version, quality=WEBP_QUALITY)
    (options.out / "ATTRIBUTION.txt").write_text(notice, encoding="utf-8")
    (options.out / "LICENSE-twemoji.txt").write_text(LICENSE_TWEMOJI, encoding="utf-8")
    (options.out / "LICENSE-metadata.txt").write_text(metadata_license, encoding="utf-8")
    print(
        f"{len(kept)} emoji, {sum(entry['split'] == 'test' for entry in emoji)} held out by name, "
        f"{sum(entry['held_out_style'] is not None for entry in emoji)} held out in one style -> {options.out}"
    )


if __name__ == "__main__":
    main()
