"""The demo's page: one HTML file, style inside, pictures beside it; no scripts, light and dark."""

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vistok.demo import DemoReport, PipelineResult, Shown, TokenizerResult
    from vistok.metrics import Evaluation

STYLE = """
:root { color-scheme: light dark; --paper: #faf8f4; --card: #ffffff; --ink: #26241f; --soft: #6d685e; --line: #e5e0d6; --tint: #b4552d;
  --bar: #ecd3c4; --code: #f1ede4 }
@media (prefers-color-scheme: dark) { :root { --paper: #191816; --card: #22211e; --ink: #ebe7df; --soft: #a39d91; --line: #36342f;
  --tint: #e58f63; --bar: #553525; --code: #2a2824 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 4rem 1.25rem 5rem }
h1, h2 { font-family: "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif; font-weight: 600; line-height: 1.2;
  letter-spacing: -.01em; text-wrap: balance }
h1 { font-size: clamp(2.1rem, 6vw, 3.2rem); margin: 0 0 1rem }
h2 { font-size: 1.75rem; margin: 4.5rem 0 .4rem }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; font-weight: 600 }
p { max-width: 42rem; margin: .5rem 0 1rem; text-wrap: pretty }
.lead { font-size: 1.15rem } .soft, figcaption, .protocol { color: var(--soft) }
.protocol { font-size: .82rem; max-width: none; margin-top: .6rem }
a { color: var(--tint) }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.4rem; margin-top: 1.6rem; font-size: .95rem }
nav a { text-decoration: none } nav a:hover { text-decoration: underline }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem; overflow-x: auto }
img { display: block; width: 100%; height: auto; border-radius: 8px; background: #fff }
.strip { flex: 1; display: grid; gap: .45rem; min-width: max-content; grid-template-columns: repeat(var(--columns), minmax(4rem, 1fr)) }
.strip span { font-size: .8rem; color: var(--soft); text-align: center; align-self: end; font-variant-numeric: tabular-nums }
.card + p { margin-top: 2.2rem } .card + .protocol { margin-top: .6rem }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)) }
.groups { display: grid; gap: 0 1.6rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
.groups .tiles { grid-template-columns: repeat(auto-fill, minmax(3.6rem, 1fr)) }
.pairs { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)) }
figure { margin: 0 } figure > div { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem }
figcaption { font-size: .82rem; line-height: 1.4; margin-top: .4rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; font-size: .82rem; color: var(--soft) } tr:last-child td { border-bottom: 0 }
th:first-child, td:first-child { text-align: left }
.bar { background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)) no-repeat }
pre { background: var(--code); border-radius: 10px; padding: 1rem 1.1rem; overflow-x: auto; font: .87rem/1.65 ui-monospace, Menlo, Consolas,
  monospace; margin: .8rem 0 1.2rem }
footer { margin-top: 4.5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); font-size: .88rem; color: var(--soft) }
footer p { max-width: none; margin: .2rem 0 }
"""

OWN_FOLDER = """vistok train tokenizer --recipe fsq2d-emoji --data PHOTOS --out runs/tokenizer
vistok train generator --recipe gpt-emoji --data PHOTOS --tokenizer runs/tokenizer --out runs/generator
vistok reconstruct PHOTOS/one.jpg --model runs/tokenizer --out strip.png
vistok generate --model runs/generator --num-images 16 --out samples"""

FLEXTOK = """vistok train tokenizer --recipe vae-emoji --data PHOTOS --out runs/vae
vistok train tokenizer --recipe flextok-emoji --vae runs/vae --data PHOTOS --out runs/flextok"""


def render(report: "DemoReport", protocol_line: Callable[["Evaluation"], str]) -> str:
    """The whole page. protocol_line: says in one line how an evaluation was made."""
    titles = {"pieces": "What is left of a picture", "new": "New pictures", "copies": "Is it copying?", "figures": "Figures"}
    titles["own"] = "On your own pictures"
    sections = {
        "pieces": [_tokenizer(result) for result in report.tokenizers],
        "new": [_pipeline(result) for result in report.pipelines],
        "copies": [_copies(result) for result in report.pipelines if result.closest],
        "figures": [_figures(report, protocol_line)],
        "own": [_own()],
    }
    sections = {key: parts for key, parts in sections.items() if parts}
    body = "".join(f'<section id="{key}"><h2>{titles[key]}</h2>{"".join(parts)}</section>' for key, parts in sections.items())
    links = "".join(f'<a href="#{key}">{titles[key]}</a>' for key in sections)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vistok: pictures as a handful of tokens</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<header><h1>Pictures as a handful of tokens</h1>"
        '<p class="lead">A tokenizer turns a picture into a short list of numbers and back. A generator learns which number follows which, '
        "and so makes pictures nobody has drawn. Below is what small models, trained on a few thousand emoji or on your folder, do with "
        f"pictures that were kept from them.</p>{notes}<nav>{links}</nav></header>\n"
        f"{body}\n<footer>{_footer(report)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _picture(shown: "Shown") -> str:
    return f'<img src="{escape(shown.file)}" alt="{escape(shown.alt)}">'


def _model(source: str, about: str) -> str:
    return f'<p><b>{escape(source)}</b> <span class="soft">{escape(about)}</span></p>'


def _tokenizer(result: "TokenizerResult") -> str:
    is_nested = len(result.counts) > 1
    told = (
        "Each row is one held-out picture. The same list of tokens, cut after 1, 2, 4 ... tokens, gives every picture in the row: the "
        "first tokens say what it is, the later ones add detail."
        if is_nested
        else f"Each row is one held-out picture and what {result.counts[0]} tokens, one for each square of a grid, keep of it."
    )
    heads = ["original", *(f"{count} token{'s' if count > 1 else ''}" for count in result.counts)]
    rows = [result.rows] if is_nested else [result.rows[i::4] for i in range(4)]  # narrow strips side by side
    strips = "".join(_strip(heads, part) for part in rows if part)
    style = "" if is_nested else ' style="display: flex; gap: 1rem 2rem; flex-wrap: wrap"'
    return f'{_model(result.source, result.about)}<p>{told}</p><div class="card"{style}>{strips}</div>'


def _strip(heads: list[str], rows: list[list["Shown"]]) -> str:
    cells = "".join(f"<span>{head}</span>" for head in heads)
    cells += "".join(f"<div>{_picture(shown)}</div>" for row in rows for shown in row)
    return f'<div class="strip" style="--columns: {len(heads)}">{cells}</div>'


def _pipeline(result: "PipelineResult") -> str:
    groups = "".join(
        f'<div><h3>{escape(title)}</h3><div class="tiles">{"".join(map(_picture, pictures))}</div></div>'
        for title, pictures in result.groups
    )
    page = f'{_model(result.source, result.about)}<p>Every sample that was drawn, none left out.</p><div class="card groups">{groups}</div>'
    if result.captions:
        pairs = "".join(_pair(left, right, f"“{right.caption}”") for left, right in result.captions)
        page += (
            "<h3>Asked by caption</h3><p>The captions belong to pictures it has never seen: on the left the real one, on the right what "
        )
        page += f'it made of the words.</p><div class="card pairs">{pairs}</div>'
    return page


def _pair(left: "Shown", right: "Shown", caption: str) -> str:
    return f"<figure><div>{_picture(left)}{_picture(right)}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _copies(result: "PipelineResult") -> str:
    row, limit = result.evaluation.rows[0], result.evaluation.protocol.options["near_copy_psnr"]
    told = (
        f"The samples that come nearest to a training picture, beside that picture. Above {limit:g} dB we call it a near copy: "
        f"{row['near_copies']:.0%} of the samples are, and {row['near_copies_of_reference']:.0%} of the held-out pictures, which cannot be."
    )
    pairs = "".join(_pair(left, right, right.caption) for left, right in result.closest)
    return f'{_model(result.source, "")}<p>{told}</p><div class="card pairs">{pairs}</div>'


def _figures(report: "DemoReport", protocol_line: Callable[["Evaluation"], str]) -> str:
    parts = [
        "<p>PSNR and SSIM compare pixels, higher is closer. The Frechet distance compares two sets of pictures, lower is closer; on few "
        "pictures it is large, so compare only within a table. Recognised: the share of reconstructions whose nearest original, among all "
        "that were measured, is their own.</p>"
    ]
    for result in report.tokenizers:
        speed = f"encodes {result.encode_speed:.1f} and decodes {result.decode_speed:.1f} images per second"
        heads = ["tokens", "PSNR, dB", "SSIM", result.evaluation.protocol.frechet_name, "recognised"]
        best = max(row["psnr"] for row in result.evaluation.rows)
        rows = [
            [
                _cell(str(row["num_tokens"])),
                _cell(f"{row['psnr']:.2f}", row["psnr"] / max(best, 1e-9)),
                _cell(f"{row['ssim']:.3f}"),
                _cell(f"{row['frechet']:.3g}"),
                _cell(f"{row['nearest_is_right']:.0%}", row["nearest_is_right"]),
            ]
            for row in result.evaluation.rows
        ]
        parts.append(_model(result.source, speed) + _table(heads, rows) + _protocol(protocol_line(result.evaluation)))
    for result in report.pipelines:
        row = result.evaluation.rows[0]
        heads = [
            "samples",
            result.evaluation.protocol.frechet_name,
            "precision",
            "recall",
            "near copies",
            "of held-out pictures",
            "images/s",
        ]
        values = [str(row["num_samples"]), f"{row['frechet']:.3g}", f"{row['precision']:.0%}", f"{row['recall']:.0%}"]
        values += [f"{row['near_copies']:.0%}", f"{row['near_copies_of_reference']:.0%}", f"{result.speed:.1f}"]
        parts.append(_model(result.source, result.about) + _table(heads, [[_cell(value) for value in values]]))
        parts.append(_protocol(protocol_line(result.evaluation)))
    return "".join(parts)


def _cell(text: str, part: float | None = None) -> str:
    return f"<td>{text}</td>" if part is None else f'<td class="bar" style="--part: {100 * min(max(part, 0), 1):.0f}%">{text}</td>'


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _protocol(line: str) -> str:
    return f'<p class="protocol">{escape(line)}</p>'


def _own() -> str:
    return (
        "<p>Put pictures into a folder, one folder a class if they have classes, and type:</p>"
        f"<pre>{escape(OWN_FOLDER)}</pre>"
        "<p>A FlexTok, whose tokens are ordered from the gist to the detail, needs a VAE first, and hours instead of minutes on a CPU:</p>"
        f"<pre>{escape(FLEXTOK)}</pre>"
        "<p>Every run can be stopped with Ctrl-C and continued by the same command with <code>--resume</code>; "
        "<code>vistok COMMAND --help</code> explains every option.</p>"
    )


def _footer(report: "DemoReport") -> str:
    from vistok import __version__

    lines = [f"vistok {__version__}; images: {report.data}; this page took {report.seconds:.0f} seconds. All figures: figures.json."]
    if report.data.startswith("emoji"):
        lines.append("Emoji: Noto Emoji and Twemoji; their licences come with the package (vistok/data/emoji).")
    if report.missing:
        lines.append(f"Not shown, because not in this installation: {', '.join(report.missing)}.")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
