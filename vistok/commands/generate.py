"""`vistok generate`: class names or captions become images, a grid, their tokens, and a record of how they were made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vistok.commands.common import Device, Folder, Model, Threads, optional, shown, shows_progress, use_device
from vistok.commands.reconstruct import decode_options


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make new images with a trained pipeline (generator and tokenizer).

    OUT gets 0000.png, 0001.png, ..., grid.png (a row a label or prompt), tokens.safetensors (ids or values) and generation.json (seed,
    options, speed). The same seed gives the same images; image i does not depend on how many there are.

        vistok generate --model vistok/emoji-gpt --labels "Food & Drink" Symbols --num-images 8 --seed 1 --out samples
        vistok generate --model vistok/emoji-xar --labels Symbols --num-steps 20 --solver euler --out symbols
        vistok generate --model vistok/emoji-gpt --prompts "noto: red apple" --num-tokens 8 --guidance-scale 2 --out apples
    """

    model: Model
    """The pipeline: a run folder of `vistok train generator`, a bundled name (vistok/emoji-gpt) or a hub id."""
    out: Folder
    """Folder for the images; files of an earlier call with the same names are replaced."""
    labels: shown(tuple[str, ...], "CLASS...", "default: none") = ()
    """Classes by name or number; `vistok info MODEL` lists them."""
    prompts: shown(tuple[str, ...], "TEXT...", "default: none") = ()
    """Captions, for a generator that reads them. With --labels, the i-th of each belong together; with neither, unconditional."""
    num_images: int = 4
    """Images for each label or prompt."""
    num_tokens: optional(int, "K", "default: all") = None
    """Tokens an image; fewer only with a tokenizer of ordered tokens (FlexTok): quicker, and less detailed."""
    guidance_scale: float = 1.5
    """How strongly the condition counts; 1 is off."""
    temperature: float = 1.0
    """Below 1: safer and less varied."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens up to this much probability."""
    min_p: float = 0.0
    """Leave out tokens below this fraction of the likeliest one's probability."""
    typical_p: float = 1.0
    """Choose among the tokens that surprise as much as expected, up to this much probability."""
    row_window: optional(int, "N", "default: rows one after another") = None
    """Start a row of a grid when the row above has N tokens (ZipAR): several times quicker, other images."""
    row_window_adapts: bool = False
    """Let a row also wait until its first token stays the same while the row above grows: less quick, nearer to plain decoding."""
    exits: optional(int, "LAYERS", "default: all layers") = None
    """Run ever fewer layers for later tokens, down to the first and this many of the last (SkipDecode): quicker, other images."""
    num_steps: optional(int, "N", "default: 40 of an xAR") = None
    """Of an xAR, solver steps of the first entity (a cell, a scale, ...); of a MaskGIT, passes, 8 by default; of TokenFlow's generator,
    passes over each scale, 3 by default. Fewer are quicker."""
    final_steps: optional(int, "N", "default: as the first") = None
    """Solver steps of an xAR's last entity, linear in between; later entities need fewer."""
    solver: optional(Literal["euler", "euler_maruyama"], "{euler,euler_maruyama}", "default: euler_maruyama") = None
    """Solver of an xAR: with noise in every step (euler_maruyama), or without."""
    prefix: optional(Path, "FILE", "default: none") = None
    """tokens.safetensors of an earlier call for as many images: keep their first entities and draw the rest."""
    prefix_entities: int = 1
    """How many entities of --prefix are kept: tokens of a GPT, scales of a VAR, whatever an xAR makes at once."""
    drafter: optional(str, "NAME", "default: plain decoding") = None
    """Draft tokens and verify many in one pass: jacobi, recycling, copy, skip, model, eagle, medusa, chimera; or the folder of a trained
    head or a smaller generator."""
    drafter_options: shown(tuple[str, ...], "NAME=VALUE...", "default: the drafter's") = ()
    """Its options, such as length=6."""
    rule: optional(str, "NAME", "default: standard") = None
    """Which drafts are kept. "standard" changes nothing but the speed; "lantern_budget" and others keep more and change the images."""
    rule_options: shown(tuple[str, ...], "NAME=VALUE...", "default: the rule's") = ()
    """Its options, such as k=100."""
    eps: optional(float, "E", "default: the rule's") = None
    """How much total variation a token may lose; alone it means --rule lantern_budget."""
    num_draft_tokens: optional(int | Literal["auto"], "N", "default: as the drafter makes") = None
    """Tokens drafted for a pass; 0 is plain decoding; auto finds out how many pay, or that none do."""
    decode_steps: optional(int, "N", "default: the model's") = None
    """Solver steps of a flow decoder (FlexTok)."""
    seed: optional(int, "S", "default: drawn, and written down") = None
    """Makes the same images again."""
    batch_size: int = 32
    """Images in memory at once; the result does not depend on it."""
    int8: bool = False
    """Round the generator's matrices to int8: large ones decode faster on a CPU, and the images are slightly others."""
    device: Device = None
    """Where the models run: cpu, cuda, cuda:1, mps."""
    threads: Threads = None
    """CPU threads of torch."""

    def run(self) -> None:
        from safetensors.torch import save_file

        import vistok
        from vistok.image import make_grid

        device = use_device(self.device, self.threads)
        pipe = vistok.load(self.model)
        if not isinstance(pipe, vistok.TokenImagePipeline):
            raise ValueError(f"{self.model} is a {type(pipe).__name__}, not a pipeline: `vistok train generator` makes one")
        pipe = pipe.to(device)
        if self.int8:
            vistok.to_int8(pipe.generator)
        pipe.set_progress_bar_config(desc="generate", unit="token", disable=not shows_progress())
        named = ("num_tokens", "guidance_scale", "temperature", "top_k", "top_p", "min_p", "typical_p")
        given = ("num_steps", "final_steps", "solver", "row_window", "exits")
        sampling = {name: getattr(self, name) for name in named}
        sampling |= {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        if self.row_window_adapts:
            sampling["row_window_adapts"] = True
        if self.prefix is not None:
            sampling["prefix"] = read_prefix(self.prefix, pipe, self.prefix_entities)
        decoding = decode_options(pipe.tokenizer, num_steps=self.decode_steps)
        drafting = self.drafting(pipe)
        labels = [as_label(label, pipe.classes) for label in self.labels]
        output = pipe(
            labels=labels or None,
            prompts=self.prompts or None,
            num_images=self.num_images,
            seed=self.seed,
            batch_size=self.batch_size,
            decode_options=decoding,
            **sampling,
            **drafting,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        files = [f"{i:04d}.png" for i in range(len(output.images))]
        for name, image in zip(files, output.images, strict=True):
            image.save(self.out / name)
        conditions = len(labels or self.prompts)
        make_grid(output.images, columns=self.num_images if conditions > 1 else None).save(self.out / "grid.png")
        kind = "values" if output.tokens.ids is None else "ids"
        save_file({kind: output.tokens.data.contiguous(), "counts": output.tokens.counts.contiguous()}, self.out / "tokens.safetensors")
        if self.prefix is not None:
            sampling |= {"prefix": str(self.prefix), "prefix_entities": self.prefix_entities}
        record = {
            "model": self.model,
            "seed": output.seed,
            "labels": list(self.labels),
            "prompts": list(self.prompts),
            "num_images": self.num_images,
            "int8": self.int8,
            **sampling,
            "decode_options": decoding,
            **{name: getattr(self, name) for name in ("drafter", "rule", "eps", "num_draft_tokens") if getattr(self, name) is not None},
            **{name: list(getattr(self, name)) for name in ("drafter_options", "rule_options") if getattr(self, name)},
            "stats": {**asdict(output.stats), "tokens_per_second": round(output.stats.tokens_per_second, 1)},
            "vistok": vistok.__version__,
            "files": files,
        }
        (self.out / "generation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        seconds = output.stats.seconds + output.stats.decode_seconds
        print(f"{len(files)} images in {seconds:.1f} s, seed {output.seed}: {self.out / Path('grid.png')}")
        if drafting:
            print(output.stats.summary())

    def drafting(self, pipe) -> dict:
        """Arguments of the pipeline for drafting; none where nothing asks for it."""
        if self.drafter is None:
            if self.drafter_options or self.rule_options:
                raise ValueError("--drafter-options and --rule-options need a --drafter")
            return {name: getattr(self, name) for name in ("rule", "eps", "num_draft_tokens") if getattr(self, name) is not None}
        from vistok.decoding.accept import rule_options
        from vistok.decoding.drafters.choose import choose_drafter, choose_rule, options_of, read_options
        from vistok.decoding.speculative import check_target

        check_target(pipe.generator)
        options = read_options(self.drafter_options, options_of(self.drafter), "drafter option")
        name = self.rule or ("standard" if self.eps is None else "lantern_budget")
        of_rule = read_options(self.rule_options, rule_options(name), "rule option")
        rule = choose_rule(name, tokenizer=pipe.tokenizer, target=pipe.generator, eps=self.eps, options=of_rule)
        return dict(drafter=choose_drafter(self.drafter, pipe.generator, options), rule=rule, num_draft_tokens=self.num_draft_tokens)


def read_prefix(path: Path, pipe, num_entities: int):
    """Ids [n, tokens] of the first tokens or scales in a file, or for an xAR values [n, slots, C] of its first entities.

    Raises ValueError: the file holds no tokens of this pipeline, or not so many entities. OSError: no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from vistok.decoding.serving import first_entities
    from vistok.tokens import VisualTokens

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    kind = "values" if pipe.tokenizer.codebook_size is None else "ids"
    if kind not in found:
        raise ValueError(f"{path} holds {', '.join(sorted(found)) or 'nothing'}, but the tokens of this pipeline are {kind}")
    layout, counts = pipe.generator.layout, found.get("counts")
    make = VisualTokens.from_values if kind == "values" else VisualTokens.from_ids
    return first_entities(pipe.generator, pipe.tokenizer, make(found[kind], layout, counts), num_entities)


def as_label(text: str, classes: tuple[str, ...]) -> str | int:
    """A class as the pipeline takes it: a number where the text is one and no class has that name."""
    return int(text) if text.isdecimal() and text not in classes else text
