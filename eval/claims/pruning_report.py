"""The tables, the curves and the verdicts of `eval.claims.pruning`, computed from its measurements alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from eval.claims.verdicts import Judgement

RANDOM = "random"
VIT_CLAIMS = (
    # (what is claimed, A, B): A is at least as good as B at the same multiply-adds
    ("merging beats dropping at random (ToMe)", "ToMe", RANDOM),
    ("proportional attention helps ToMe", "ToMe", "ToMe, no proportional attention"),
    ("proportional attention helps PiToMe", "PiToMe", "PiToMe, no proportional attention"),
    ("PiToMe beats ToMe, both with proportional attention", "PiToMe", "ToMe"),
    ("PiToMe beats ToMe, both without", "PiToMe, no proportional attention", "ToMe, no proportional attention"),
    (
        "PiToMe as its code runs (half the layers unprotected, no proportional attention) beats ToMe as its code runs",
        "PiToMe as coded",
        "ToMe",
    ),
    ("the keys are the better metric for ToMe than the block's input", "ToMe", "ToMe, metric input"),
    ("Zero-TPrune beats random", "Zero-TPrune", RANDOM),
    ("Zero-TPrune beats ToMe", "Zero-TPrune", "ToMe"),
    ("Zero-TPrune: the similarity stage helps", "Zero-TPrune", "Zero-TPrune without S"),
    ("Zero-TPrune: filtering heads by variance helps", "Zero-TPrune", "Zero-TPrune without VHF"),
    ("Zero-TPrune: starting at the class token helps", "Zero-TPrune", "Zero-TPrune, uniform start"),
    ("Zero-TPrune: all its parts together help", "Zero-TPrune", "Zero-TPrune, page rank alone"),
    ("attention of the class token beats random", "class-token attention", RANDOM),
    ("ToMe beats a smaller picture", "ToMe", "smaller picture"),
    ("dropping at random beats a smaller picture", RANDOM, "smaller picture"),
)
VLM_CLAIMS = (
    ("DivPrune beats random", "DivPrune", RANDOM),
    ("class-token attention (FasterVLM) beats random", "class-token attention", RANDOM),
    ("VisionZip beats random", "VisionZip", RANDOM),
    ("VisionZip beats the class-token attention it starts from", "VisionZip", "class-token attention"),
    ("DivPrune beats class-token attention", "DivPrune", "class-token attention"),
    ("CDPruner (diversity and the question) beats DivPrune (diversity alone)", "CDPruner", "DivPrune"),
    ("DivPrune beats a smaller picture", "DivPrune", "smaller picture"),
)
INSIDE_CLAIMS = (
    ("FastV beats random from the same layer on", "FastV", RANDOM),
    ("SparseVLM (words that look at the picture) beats FastV (the last word)", "SparseVLM", "FastV"),
    ("SparseVLM+ beats SparseVLM", "SparseVLM+", "SparseVLM"),
    ("DART beats FastV", "DART", "FastV"),
    ("PyramidDrop beats random in the same stages", "PyramidDrop", "random in stages"),
)
GATE_CLAIMS = (
    ("the delete gate beats random", "delete gate", RANDOM),
    ("the delete gate beats evenly spaced patches", "delete gate", "uniform"),
    ("the delete gate beats the class token's attention", "delete gate", "class-token attention"),
    ("the delete gate beats ToMe", "delete gate", "ToMe"),
)
LEARNED_CLAIMS = (
    ("beats PyramidDrop at as many tokens after the same stages", "PyramidDrop"),
    ("beats FastV at as many tokens from its first stage on", "FastV"),
    ("beats random tokens in the same stages", RANDOM),
    ("beats every second row and column of tokens from its first stage on", "every second row and column"),
)


def learned_baselines(title: str, seeds: Sequence[int]) -> list[str]:
    """Settings that a learned pruner is held against, at its own numbers of tokens."""
    names = ("PyramidDrop", "FastV", "every second row and column")
    return [f"{name}, as {title}" for name in names] + [f"{RANDOM}, as {title} {seed}" for seed in seeds]


def series(rows: dict[str, dict], part: str, name: str, field: str) -> dict[str, torch.Tensor]:
    """budget -> [n] numbers of a setting; the seeds of a random one are averaged image by image."""
    found: dict[str, list] = {}
    for key, row in rows.items():
        owner, setting, budget = key.split("/")
        if owner == part and (setting == name or (name.startswith(RANDOM) and setting.rpartition(" ")[0] == name)):
            found.setdefault(budget, []).append(row[field])
    return {budget: torch.tensor(values, dtype=torch.float64).mean(dim=0) for budget, values in found.items()}


def compare(rows: dict[str, dict], part: str, claim: tuple[str, str, str], field: str = "right") -> Judgement:
    """A against B over the budgets both reach, image by image: accuracy in points, or for `divergence` how much less A has, in nats."""
    what, ours, theirs = claim
    a, b = (series(rows, part, name, field) for name in (ours, theirs))
    shared = [budget for budget in a if budget in b]
    if not shared:
        raise ValueError(f"{what}: {ours!r} and {theirs!r} are not measured at one budget")
    difference = torch.stack([a[budget] - b[budget] for budget in shared]).mean(dim=0) * (100 if field == "right" else -1)
    spread = float(difference.std() / len(difference) ** 0.5)
    return Judgement(what, float(difference.mean()), spread, 0.0, 1, " points" if field == "right" else " nats")


def markdown(rows: dict[str, dict], about: dict) -> str:
    """Tables of accuracy and divergence, verdicts, the probe, machine and command."""
    lines = [
        f"{about['num_images']} held-out images and as many questions; one trained model each, so what another training would change is "
        f"not known. A cell is accuracy ± standard error of its paired drop from the unpruned model, and KL(unpruned || pruned) in nats; "
        f"random is the mean of {len(about['seeds'])} draws. A verdict reads the accuracy over all budgets that both sides reach, paired "
        "image by image; where that decides nothing, the divergence beside it may.",
        "",
        *_table(rows, "vit", "share of multiply-adds left, classifier"),
        *_verdicts(rows, "vit", VIT_CLAIMS),
    ]
    if "vit-gate" in {key.split("/")[0] for key in rows}:
        lines += _table(rows, "vit-gate", "share of patches left behind the last gate")
        lines += _verdicts(rows, "vit-gate", GATE_CLAIMS)
    if "vlm/unpruned/1" in rows:
        lines += [*_kinds(rows), *_table(rows, "vlm", "share of visual tokens left before the language model")]
        lines += _verdicts(rows, "vlm", VLM_CLAIMS)
        lines += _table(rows, "vlm-inside", "share of visual tokens left from layer 2 on (in stages: from layers 2, 3 and 4)")
        lines += _verdicts(rows, "vlm-inside", INSIDE_CLAIMS)
        lines += _learned(rows)
    hardware = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return "\n".join([*lines, f"Machine: {hardware}. Command: `{about['command']}`"])


def _names(rows: dict[str, dict], part: str) -> list[str]:
    names = []
    for key in rows:
        owner, setting, _ = key.split("/")
        name = setting.rpartition(" ")[0] if setting.startswith(RANDOM) else setting
        if owner == part and name not in (*names, "unpruned", "no picture"):
            names.append(name)
    return names


def _table(rows: dict[str, dict], part: str, title: str) -> list[str]:
    full = torch.tensor(rows[f"{part.split('-')[0]}/unpruned/1"]["right"], dtype=torch.float64)
    names = _names(rows, part)
    budgets = list(series(rows, part, names[0], "right"))
    lines = [f"| {title} | " + " | ".join(budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    lines.append(f"| unpruned | {100 * full.mean():.1f} |" + " |" * (len(budgets) - 1))
    for name in names:
        right, divergence = series(rows, part, name, "right"), series(rows, part, name, "divergence")
        cells = []
        for budget in budgets:
            if budget not in right:
                cells.append("-")
                continue
            drop = full - right[budget]
            cells.append(f"{100 * right[budget].mean():.1f} ± {100 * drop.std() / len(drop) ** 0.5:.1f}, {divergence[budget].mean():.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _verdicts(rows: dict[str, dict], part: str, claims: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = []
    for claim in claims:
        accuracy, closeness = compare(rows, part, claim), compare(rows, part, claim, "divergence")
        lines.append(
            f"* {claim[0]}: **{accuracy.verdict}**, {accuracy.difference:+.2f} ± {accuracy.spread:.2f} points; divergence smaller by "
            f"{closeness.difference:.3g} ± {closeness.spread:.2g} nats ({closeness.verdict})"
        )
    return [*lines, ""]


def _learned(rows: dict[str, dict]) -> list[str]:
    """Each learned pruner beside what keeps as many tokens without learning, and what can be said of it."""
    part, full, lines = "vlm-learned", torch.tensor(rows["vlm/unpruned/1"]["right"], dtype=torch.float64), []
    for title in [name for name in _names(rows, part) if ", as " not in name]:
        facts = rows[f"{part}/{title}/learned"]
        shares = ", ".join(f"{share:.3f}" for share in facts["shares"])
        lines += [f"| stages before layers {', '.join(map(str, facts['layers']))}: {shares} of the tokens left | |", "|---|---|"]
        names = [name for name in _names(rows, part) if name == title or name.endswith(f", as {title}")]
        for name in names:
            right, divergence = (series(rows, part, name, field)["learned"] for field in ("right", "divergence"))
            drop = full - right
            error = 100 * drop.std() / len(drop) ** 0.5
            lines.append(f"| {name} | {100 * right.mean():.1f} ± {error:.1f}, {divergence.mean():.3g} |")
        loss = 100 * (series(rows, part, title, "right")["learned"] - full)
        kept = Judgement("", float(loss.mean()), float(loss.std() / len(loss) ** 0.5), -2.0, 1)
        removed = 1 - fmean(facts["shares"])
        what = f"{title} with {removed:.0%} of the visual tokens removed stays within 2 points of the unpruned accuracy"
        lines += ["", f"* {what}: **{kept.verdict}**, {kept.difference:+.2f} ± {kept.spread:.2f} points"]
        lines += _verdicts(rows, part, [(f"{title} {claim}", title, f"{name}, as {title}") for claim, name in LEARNED_CLAIMS])
    return lines


def _kinds(rows: dict[str, dict]) -> list[str]:
    """Accuracy for each kind of question: unpruned, without a picture, and with every visual token dropped at layer k."""
    kinds = rows["vlm/unpruned/1"]["kinds"]
    names = sorted(set(kinds))
    chosen = {"unpruned": "vlm/unpruned/1", "no picture": "vlm/no picture/0"}
    chosen |= {f"no visual token from {key.split('/')[1]} on": key for key in rows if key.startswith("vlm-probe/")}
    lines = ["| questions | " + " | ".join(names) + " | all |", "|---" * (len(names) + 2) + "|"]
    for title, key in chosen.items():
        right = rows[key]["right"]
        cells = [100 * fmean(value for value, kind in zip(right, kinds) if kind == name) for name in names]
        lines.append(f"| {title} | " + " | ".join(f"{value:.1f}" for value in [*cells, 100 * fmean(right)]) + " |")
    return [*lines, ""]


def draw_curves(rows: dict[str, dict], path: Path) -> None:
    """Accuracy and divergence of the classifier against the multiply-adds really spent. Raises ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install vistok[dev]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = (
        "ToMe",
        "ToMe, no proportional attention",
        "PiToMe",
        "Zero-TPrune",
        "class-token attention",
        "uniform",
        RANDOM,
        "smaller picture",
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name in shown:
        macs = {key: float(values.mean()) for key, values in series(rows, "vit", name, "macs_ratio").items()}
        for axis, field, scale in ((axes[0], "right", 100), (axes[1], "divergence", 1)):
            values = series(rows, "vit", name, field)
            points = sorted((macs[budget], scale * float(value.mean())) for budget, value in values.items())
            axis.plot(*zip(*points), marker="o", markersize=3.5, linewidth=1.4, label=name)
    axes[0].axhline(100 * fmean(rows["vit/unpruned/1"]["right"]), color="black", linewidth=0.8, linestyle=":", label="unpruned")
    axes[0].set_ylabel("accuracy, %")
    axes[1].set_ylabel("KL(unpruned || pruned), nats")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("multiply-adds, share of unpruned")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
