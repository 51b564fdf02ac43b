"""The table and the verdicts of `eval.claims.tokenizers`, computed from its numbers alone."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev

from eval.claims.verdicts import Judgement, all_of, judge

EQUAL_PSNR = 0.5  # decibels within which two reconstructions count as equal
EQUAL_PROBE = 2.0  # points within which two probes do
HALF = 50.0
CLAIMS = {
    "a": "a shared dual codebook beats a single one on understanding at equal reconstruction",
    "b": "causal 1D tokens beat raster tokens for next-token likelihood and retrieval",
    "c": "dynamic length halves tokens at equal quality",
}
# column: (title, value of a result, scale, digits)
COLUMNS = (
    ("parameters M", lambda r: r["parameters"], 1e-6, 2),
    ("training s", lambda r: r["seconds"], 1, 0),
    ("steps", lambda r: r["steps"], 1, 0),
    ("tokens", lambda r: r["tokens"], 1, 1),
    ("bits an image", lambda r: r["bits_per_image"], 1, 0),
    ("PSNR", lambda r: r["psnr"], 1, 2),
    ("Frechet(conv)", lambda r: r["frechet"], 1, 2),
    ("probe %", lambda r: r["understanding"].get("linear"), 100, 1),
    ("kNN %", lambda r: r["understanding"].get("knn"), 100, 1),
    ("retrieval R@5 %", lambda r: retrieval(r), 100, 1),
    ("usage %", lambda r: r["usage"], 100, 1),
    ("GPT bits a token", lambda r: r["likelihood"]["bits_per_token"], 1, 2),
    ("GPT bits an image", lambda r: r["likelihood"]["bits_per_image"], 1, 0),
    ("told %", lambda r: r["likelihood"]["told"], 100, 1),
)


def retrieval(result: dict) -> float | None:
    """R@5, mean of both directions; None without captions."""
    row = result["understanding"]
    return (row["i2t_r5"] + row["t2i_r5"]) / 2 if "i2t_r5" in row else None


def markdown(results: dict[str, dict[str, dict]], claims: dict, about: dict) -> str:
    """The table, a line of what its words mean, the verdicts with their numbers, machine and command."""
    lines = ["| model | order | " + " | ".join(title for title, *_ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, rows in results.items():
        cells = [_cell([value(row) for row in rows.values()], scale, digits) for _, value, scale, digits in COLUMNS]
        lines.append(f"| {name} | {next(iter(rows.values()))['order']} | " + " | ".join(cells) + " |")
    seeds = len(about["seeds"])
    spread = f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed; its spread over seeds is not known"
    chance = about["chance"]
    known = [f"probe and kNN {100 * chance['linear']:.1f} %"] if "linear" in chance else []
    known += [f"R@5 {50 * (chance['i2t_r5'] + chance['t2i_r5']):.1f} %"] if "i2t_r5" in chance else []
    lines += [
        "",
        f"{about['minutes']:g} minutes of training each, {about['training_images']} training and {about['test_images']} held-out images of "
        f"{about['data']}; {spread}. Chance: {', '.join(known)}. Captions read by {about['captions']}. `told`: share of the unigram law's "
        f"bits that a small GPT ({about['gpt_seconds']:g} s) saves by knowing the tokens before.",
        "",
    ]
    for key, claim in claims.items():
        provisional = "" if seeds > 1 else " (one seed: provisional)"
        lines.append(f"**({key}) {claim['claim']}: {claim['verdict']}{provisional}.**")
        lines += [f"* {line}" for line in claim["lines"]]
        lines.append("")
    hardware = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return "\n".join([*lines, f"Machine: {hardware}. Command: `{about['command']}`"])


def _cell(values: Sequence[float | None], scale: float, digits: int) -> str:
    if any(value is None for value in values):
        return "-"
    text = f"{scale * fmean(values):.{digits}f}"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {scale * deviation:.{digits}f}" if deviation * scale >= 0.5 * 10**-digits else text


def verdicts(results: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """{"a": {"claim", "verdict", "lines", "parts"}, ...}; a claim whose models are not there is left out."""
    found = {}
    for key, (needed, parts) in {"a": (("tokenflow", "tokenflow-single"), _dual), "b": (("vq", "seed", "flextok"), _causal),
                                 "c": (("lavit", "lavit-fixed"), _dynamic)}.items():  # fmt: skip
        if all(name in results for name in needed):
            judgements, remarks = parts(results)
            found[key] = {
                "claim": CLAIMS[key],
                "verdict": all_of(judgements),
                "lines": [*(part.line() for part in judgements), *remarks],
                "parts": [{**asdict(part), "verdict": part.verdict} for part in judgements],
            }
    return found


def _versus(results: dict, ours: str, theirs: str, what: str, value, std, **options) -> Judgement:
    seeds = [seed for seed in results[ours] if seed in results[theirs]]
    sides = [[value(results[name][seed]) for seed in seeds] for name in (ours, theirs)]
    stds = tuple(fmean(std(results[name][seed]) for seed in seeds) for name in (ours, theirs))
    return judge(f"{ours} against {theirs}, {what}", *sides, test_stds=stds, **options)


def _probe(results: dict, ours: str, theirs: str, **options) -> Judgement:
    return _versus(
        results, ours, theirs, "probe", lambda r: 100 * r["understanding"]["linear"], lambda r: 100 * r["understanding"]["linear_std"],
        unit=" points", **options,
    )  # fmt: skip


def _retrieval(results: dict, ours: str, theirs: str, **options) -> Judgement:
    return _versus(
        results, ours, theirs, "retrieval R@5", lambda r: 100 * retrieval(r), lambda r: 100 * r["understanding"]["r5_std"],
        unit=" points", **options,
    )  # fmt: skip


def _psnr(results: dict, ours: str, theirs: str, **options) -> Judgement:
    """Images are the same on both sides, so their PSNRs rise and fall together: the spread is that of the difference image by image."""
    seeds = [seed for seed in results[ours] if seed in results[theirs]]
    pairs = [zip(results[ours][seed]["psnr_of_images"], results[theirs][seed]["psnr_of_images"], strict=True) for seed in seeds]
    stds = [stdev(differences) / len(differences) ** 0.5 for differences in ([a - b for a, b in pair] for pair in pairs)]
    sides = [[results[name][seed]["psnr"] for seed in seeds] for name in (ours, theirs)]
    return judge(f"{ours} against {theirs}, PSNR", *sides, test_stds=(fmean(stds), 0.0), unit=" dB", **options)


def _dual(results: dict) -> tuple[list[Judgement], list[str]]:
    pair = ("tokenflow", "tokenflow-single")
    parts = [_probe(results, *pair), _psnr(results, *pair, bar=-EQUAL_PSNR)]
    if all(retrieval(row) is not None for name in pair for row in results[name].values()):
        parts.append(_retrieval(results, *pair))
    return parts, []


def _causal(results: dict) -> tuple[list[Judgement], list[str]]:
    parts = []
    for name in ("seed", "flextok"):
        told = _versus(
            results, name, "vq", "told by the tokens before", lambda r: 100 * r["likelihood"]["told"],
            lambda r: 100 * r["likelihood"]["told_std"], unit=" points",
        )  # fmt: skip
        parts.append(told)
        if all(retrieval(row) is not None for model in (name, "vq") for row in results[model].values()):
            parts.append(_retrieval(results, name, "vq"))
    remarks = []
    if all("text_space" in row for row in results["seed"].values()):
        own = [(row["text_space"]["i2t_r5"] + row["text_space"]["t2i_r5"]) / 2 for row in results["seed"].values()]
        remarks.append(f"in the text space it was trained in, before quantization, seed reaches R@5 {100 * fmean(own):.1f} %")
    return parts, remarks


def _dynamic(results: dict) -> tuple[list[Judgement], list[str]]:
    pair = ("lavit", "lavit-fixed")
    shares = [-100 * row["tokens"] / results["lavit-fixed"][seed]["tokens"] for seed, row in results["lavit"].items()]
    half = judge("share of lavit-fixed's tokens, counted negative", shares, [0.0] * len(shares), bar=-HALF, unit=" %")
    parts = [half, _psnr(results, *pair, bar=-EQUAL_PSNR), _probe(results, *pair, bar=-EQUAL_PROBE)]
    remarks = []
    for seed, row in results["lavit"].items():
        curve = ", ".join(f"{count}: {value['psnr']:.2f}" for count, value in row["fixed"].items())
        own = f"{row['tokens']:.1f} tokens an image of its own choice give {row['psnr']:.2f} dB"
        remarks.append(f"seed {seed}: {own}; the same model at one length for all images {curve}")
    return parts, remarks
