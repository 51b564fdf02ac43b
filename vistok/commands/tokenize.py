"""`vistok tokenize`: a source of images becomes a folder of tokens."""

from dataclasses import dataclass

from vistok.commands.common import BadImages, Device, Folder, Model, Threads, load_tokenizer, optional, report_bad_images, shown, use_device


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Turn images into a folder of tokens, so that generators train without pixels.

    OUT holds index.json and shards (safetensors) of ids (of a VAE: values and how far they spread), labels, captions and names. An
    interrupted call goes on where it stopped when typed again; several processes or machines can share the work with --rank and
    --world-size.

        vistok tokenize --model vistok/emoji-flextok --data PHOTOS --out tokens
        vistok train generator --recipe gpt-emoji --tokenizer vistok/emoji-flextok --tokens tokens --out runs/gpt
    """

    model: Model
    """The tokenizer: a run folder, a model folder, a bundled name or a hub id."""
    data: shown(str, "PATH|emoji")
    """Images: a folder (flat, or one folder a class), emoji (the bundled set), or hf:ID."""
    out: Folder
    """Folder for the tokens."""
    split: str = "train"
    """train (nine tenths of a folder, or its train/), test (the rest) or all."""
    num_tokens: optional(int, "K", "default: all") = None
    """Tokens an image; fewer only with a tokenizer of ordered tokens (FlexTok)."""
    no_flips: bool = False
    """Leave out the mirrored images' tokens, which training uses as augmentation; half the time and space."""
    no_deviations: bool = False
    """Of a VAE, store the means of its posteriors alone, in half the space; xAR then trains on those instead of on samples."""
    image_size: optional(int, "PIXELS", "default: the model's own") = None
    """Resize and crop to this square."""
    batch_size: int = 64
    """Images encoded at once."""
    on_bad_image: BadImages = "skip"
    """A file that is no readable image: skip it and list it in OUT/bad_images.json (the next good one takes its place), or stop."""
    rank: int = 0
    """With --world-size W: this process writes every W-th shard, from this one on."""
    world_size: int = 1
    """Processes that share the work."""
    device: Device = None
    """Where the model runs: cpu, cuda, cuda:1, mps."""
    threads: Threads = None
    """CPU threads of torch."""

    def run(self) -> None:
        import vistok
        from vistok.data.tokenize import tokenize_dataset

        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be at least 0 and below world_size={self.world_size}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        tokenizer = load_tokenizer(self.model, use_device(self.device, self.threads))
        size = self.image_size or tokenizer.settings.image_size
        dataset = vistok.open_dataset(self.data, image_size=size, split=self.split, on_bad_image=self.on_bad_image)
        tokens = tokenize_dataset(
            tokenizer,
            dataset,
            self.out,
            num_tokens=self.num_tokens,
            flips=not self.no_flips,
            deviations=not self.no_deviations,
            batch_size=self.batch_size,
            source=self.data,
            rank=self.rank,
            world_size=self.world_size,
        )
        report_bad_images(dataset, self.out)
        if tokens is None:
            print(f"{self.out}: the shards of process {self.rank} of {self.world_size} are written")
        else:
            codes = f"{tokens.codebook_size} codes" if tokens.codebook_size else f"{tokens.plan.code_dim} values each"
            print(f"{self.out}: {len(tokens)} images, {tokens.plan.num_tokens} tokens each, {codes}")
