"""The table, the verdicts and the picture of `eval.claims.decoding`, computed from its numbers alone."""

from dataclasses import dataclass
from pathlib import Path

NOISE = 1.1  # a Frechet distance up to so many floors counts as none: exact settings, which differ by chance alone, stay within a tenth
FAMILIES = {
    "plain": ("plain loop", "black", "*"),
    "exact": ("exact rules", "tab:blue", "o"),
    "lantern": ("LANTERN", "tab:red", "s"),
    "lantern++": ("LANTERN++", "tab:orange", "D"),
    "budget": ("rules with a budget", "tab:green", "^"),
    "gsd": ("GSD", "tab:purple", "v"),
    "typical": ("typical (Medusa)", "tab:brown", "P"),
    "judge": ("judge", "tab:cyan", "<"),
    "zipar": ("ZipAR", "tab:pink", "X"),
    "exits": ("early exits", "tab:gray", "h"),
}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a claim here."""

    claim: str
    paper: str
    verdict: str
    """"holds", "does not hold" or "not measured"."""
    line: str
    """The numbers behind it."""


def verdicts(rows: dict[str, dict], about: dict) -> list[Verdict]:
    """Every claim that the settings at hand can decide."""
    found, limit = [], NOISE * about["floor"]

    def add(claim: str, paper: str, holds: bool, line: str) -> None:
        found.append(Verdict(claim, paper, "holds" if holds else "does not hold", line))

    def family(*names: str) -> dict[str, dict]:
        return {name: row for name, row in rows.items() if row["family"] in names}

    exact = family("exact")
    worst = max(exact.values(), key=lambda row: row["frechet_plain"])
    add(
        "exact rules do not change what is generated",
        "2211.17192, 2410.01699, 2406.16858",
        worst["frechet_plain"] <= limit,
        f"largest Frechet distance to the plain loop among {len(exact)} settings {worst['frechet_plain']:.3f}; between two plain sets "
        f"{about['floor']:.3f}, limit {limit:.3f}",
    )
    if "SJD" in rows:
        row = rows["SJD"]
        add("speculative Jacobi decoding halves the passes, losing nothing", "2410.01699", row["tokens_per_pass"] >= 2, _speed(row))
    for name in ("EAGLE", "SJD"):
        relaxed = {key: row for key, row in family("lantern").items() if key.startswith(f"{name},")}
        if name in rows and relaxed:
            best = max(relaxed, key=lambda key: relaxed[key]["tokens_per_pass"])
            gain = relaxed[best]["tokens_per_pass"] / rows[name]["tokens_per_pass"]
            add(
                f"LANTERN makes 1.75 times the tokens a pass of {name} with the exact rule, at little loss",
                "2410.03355",
                gain >= 1.75 and relaxed[best]["frechet_plain"] <= limit,
                f"{best}: {gain:.2f} times; Frechet {relaxed[best]['frechet_plain']:.3f}",
            )
    first, second = family("lantern"), family("lantern++")
    pairs = [
        (a, b)
        for a in first
        for b in second
        if a.split(",")[0] == b.split(",")[0] and second[b]["tokens_per_pass"] >= first[a]["tokens_per_pass"]
    ]
    if pairs:
        better = [(a, b) for a, b in pairs if second[b]["frechet_plain"] < first[a]["frechet_plain"]]
        add(
            "LANTERN++ is more faithful than LANTERN at the same tokens a pass or more",
            "2502.06352",
            len(better) > len(pairs) / 2,
            f"in {len(better)} of {len(pairs)} pairs",
        )
    budget = family("budget")
    if budget:
        over = [name for name, row in budget.items() if row["spent_per_token"] > row["options"]["eps"] + 1e-6]
        line = ", ".join(f"{name}: {row['spent_per_token']:.3f} of {row['options']['eps']}" for name, row in budget.items())
        add("rules with a budget spend at most eps of total variation a token", "this library", not over, line)
        dominated = []
        for name, row in {**first, **second}.items():
            rivals = [
                b for b in budget.values() if b["tokens_per_pass"] >= row["tokens_per_pass"] and b["frechet_plain"] <= row["frechet_plain"]
            ]
            dominated += [name] if rivals else []
        add(
            "for each LANTERN setting some budget is at least as quick (tokens a pass) and as faithful",
            "this library",
            len(dominated) == len(first) + len(second),
            f"for {len(dominated)} of {len(first) + len(second)}",
        )
    if "SJD" in rows and family("gsd"):
        name, row = max(family("gsd").items(), key=lambda item: item[1]["tokens_per_pass"])
        add(
            "GSD makes more tokens a pass than SJD at the same quality",
            "2508.07747",
            row["tokens_per_pass"] > rows["SJD"]["tokens_per_pass"] and row["frechet_plain"] <= limit,
            f"{name}: {row['tokens_per_pass']:.2f} against {rows['SJD']['tokens_per_pass']:.2f}, Frechet {row['frechet_plain']:.3f}",
        )
    if family("zipar"):
        name, row = min(family("zipar").items(), key=lambda item: item[1]["passes_per_image"])
        saved = 1 - row["passes_per_image"] / rows["plain"]["passes_per_image"]
        add(
            "ZipAR leaves out half the passes or more at little loss",
            "2412.04062",
            saved >= 0.5 and row["frechet_plain"] <= limit,
            f"{name}: {100 * saved:.0f} % fewer passes, Frechet {row['frechet_plain']:.3f}, {row['speedup']:.2f} times as quick",
        )
    fixed = {name: row for name, row in family("zipar").items() if not name.endswith("more")}
    pairs = [(row, rows[f"{name} or more"]) for name, row in fixed.items() if f"{name} or more" in rows]
    if pairs:
        nearer = sum(adapted["pixel_distance"] < row["pixel_distance"] for row, adapted in pairs)
        line = "; ".join(
            f"{a['passes_per_image']:.1f} against {f['passes_per_image']:.1f} passes, pixels {a['pixel_distance']:.3f} against "
            f"{f['pixel_distance']:.3f}" for f, a in pairs
        )  # fmt: skip
        add("ZipAR's adaptive window stays nearer to the plain loop's images than the fixed one", "2412.04062", nearer == len(pairs), line)
    lossy = {name: row for name, row in rows.items() if row["family"] not in ("plain", "exact") and row["frechet_plain"] <= limit}
    if lossy:
        name = max(lossy, key=lambda key: lossy[key]["speedup"])
        line = f"{name}: {_speed(lossy[name])} (floor {about['floor']:.3f})"
        add("a lossy setting whose loss does not show is 1.5 times as quick as the plain loop", "this library",
            lossy[name]["speedup"] >= 1.5, line)  # fmt: skip
    if "chosen by itself" in rows:
        row = rows["chosen by itself"]
        add(
            "left to itself, decoding is never more than 5 % slower than the plain loop",
            "this library",
            row["speedup"] >= 0.95,
            _speed(row),
        )
    return found


def _speed(row: dict) -> str:
    return f"{row['tokens_per_pass']:.2f} tokens a pass, {row['speedup']:.2f} times as quick, Frechet {row['frechet_plain']:.3f}"


def markdown(results: dict) -> str:
    """The table, what its words mean, the verdicts, machine and command."""
    about, rows = results["about"], results["rows"]
    lines = [
        "| setting | passes an image | tokens a pass | speed-up (min-max) | TV spent a token | Frechet(conv) to plain | to real | pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        spent = "-" if row["spent_per_token"] is None else f"{row['spent_per_token']:.3f}"
        low, high = min(row["speedups"]), max(row["speedups"])
        cells = [
            name,
            f"{row['passes_per_image']:.1f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})",
            spent,
        ]
        cells += [f"{row['frechet_plain']:.3f}", f"{row['frechet_real']:.2f}", f"{row['pixel_distance']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{about['model']}, guidance {about['guidance_scale']}, {about['num_samples']} images a setting. Speed-up: of one image at a time "
        f"over the plain loop beside it, median of {about['repeats']}. Frechet(conv) between two plain sets: {about['floor']:.3f}. "
        f"Pixels: root mean square distance to the plain loop's image of the same seed; between seeds {about['pixel_floor']:.3f}. "
        "TV: total variation between the law a token was drawn from and the target's; - where the rule does not know it.",
        "",
    ]
    lines += [f"* **{v['claim']}** ({v['paper']}): {v['verdict']}. {v['line']}." for v in results["verdicts"]]
    hardware = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return "\n".join([*lines, "", f"Machine: {hardware}. Command: `{about['command']}`"])


def draw_curve(results: dict, path: Path) -> None:
    """Speed against fidelity: wall clock on the left, tokens a pass on the right; the nearer to the lower right, the better."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install vistok[dev]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, floor = results["rows"], results["about"]["floor"]
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 8), sharey=True)
    for axis, (key, title) in zip(axes, (("speedup", "speed-up, one image on a CPU"), ("tokens_per_pass", "tokens a pass of the target"))):
        axis.axhline(floor, color="gray", linewidth=0.8, linestyle=":")
        for family, (label, colour, marker) in FAMILIES.items():
            chosen = {name: row for name, row in rows.items() if row["family"] == family}
            if chosen:
                axis.scatter(
                    [r[key] for r in chosen.values()], [r["frechet_plain"] for r in chosen.values()], c=colour, marker=marker, label=label
                )
            for name, row in chosen.items():
                axis.annotate(
                    name.replace("LANTERN", "L"), (row[key], row["frechet_plain"]), fontsize=5, xytext=(3, 3), textcoords="offset points"
                )
        axis.set_xlabel(title)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.margins(x=0.12)
    axes[0].set_ylabel("Frechet(conv) to the plain loop; dotted: two plain sets")
    axes[0].axvline(1, color="gray", linewidth=0.8)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
