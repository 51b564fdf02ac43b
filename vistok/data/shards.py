"""Images already turned into tokens: a folder of shards that is written piece by piece, resumed, checked, and read as one tensor.

    tokens/index.json                  the plan: counts, layout, classes, which tokenizer (its digest)
    tokens/shard_00000.safetensors     ids [m, N], counts [m], labels [m], caption_ids [m]; with flips also flipped_ids, flipped_counts;
                                       of a continuous tokenizer values [m, N, C] and flipped_values in place of ids, in half precision;
                                       of a VAE they are the posteriors' means, beside deviations [m, N, C] and flipped_deviations
    tokens/shard_00000.json            captions (each once) and names [m]

Shard s holds images s * shard_size ... A shard is written aside and renamed, its .safetensors last: a shard that exists is complete. File
names come from the plan's numbers, never from a file, so no index can point outside the folder. Shapes are compared with the plan before
anything is allocated.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vistok.tokens import TokenLayout, VisualTokens

MAX_INDEX_BYTES = 4 * 2**20
MAX_ROW_TEXT_BYTES = 16 * 2**10
"""Names and captions may take this much an image, which bounds what a reader parses."""
NEWER_FIELDS = {1: {"code_dim", "has_deviations"}, 2: {"has_deviations"}, 3: set()}
"""Fields of a plan that a format of the index does not know."""
DATA_DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """What a token folder holds; every shard is checked against it."""

    num_images: int
    num_tokens: int
    """N: columns of `ids`; shorter images are padded with -1."""
    codebook_size: int | None
    """K; None: the tokens are continuous."""
    layout: TokenLayout
    tokenizer_digest: str
    """Identifies the tokenizer's configuration and weights."""
    code_dim: int | None = None
    """C of continuous tokens; None: the tokens are ids."""
    classes: tuple[str, ...] = ()
    has_flips: bool = False
    """Whether the tokens of every mirrored image are stored too."""
    has_deviations: bool = False
    """Whether every value's standard deviation is stored too: what the tokenizer gives is a posterior."""
    shard_size: int = 8192
    """Images per shard."""
    source: str = ""
    """Where the images came from, for people."""

    def __post_init__(self):
        if (self.codebook_size is None) == (self.code_dim is None):
            given = f"codebook_size={self.codebook_size!r}, code_dim={self.code_dim!r}"
            raise ValueError(f"tokens are ids or values, so one of these must be None: {given}")
        for name in ("num_images", "num_tokens", "codebook_size" if self.code_dim is None else "code_dim", "shard_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**40:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.num_tokens > self.layout.num_tokens:
            raise ValueError(f"num_tokens={self.num_tokens} but the layout has {self.layout.num_tokens}")
        texts = (self.tokenizer_digest, self.source, *self.classes)
        flags = (self.has_flips, self.has_deviations)
        if not all(isinstance(flag, bool) for flag in flags) or not all(isinstance(text, str) for text in texts):
            raise ValueError("has_flips and has_deviations must be true or false; classes, tokenizer_digest and source must be text")
        if self.has_deviations and self.code_dim is None:
            raise ValueError("has_deviations=True but ids have no deviations")

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    @property
    def data_name(self) -> str:
        """The column that holds the tokens: "ids" or "values"."""
        return "ids" if self.code_dim is None else "values"

    @property
    def data_dtype(self) -> torch.dtype:
        """Of the ids or values on disk and in memory."""
        if self.codebook_size is None:
            return torch.float16
        return torch.int32 if self.codebook_size < 2**31 else torch.int64

    def rows(self, shard: int) -> range:
        """The images of one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def tensors(self, shard: int) -> dict[str, tuple[list[int], str]]:
        """Name -> (shape, safetensors dtype) of what a shard must hold."""
        m = len(self.rows(shard))
        copies = ("", "flipped_") if self.has_flips else ("",)
        wanted = {"labels": ([m], "I64"), "caption_ids": ([m], "I32")}
        shape = [m, self.num_tokens] if self.code_dim is None else [m, self.num_tokens, self.code_dim]
        for copy in copies:
            wanted[f"{copy}{self.data_name}"] = (shape, DATA_DTYPES[self.data_dtype])
            wanted[f"{copy}counts"] = ([m], "I64")
            if self.has_deviations:
                wanted[f"{copy}deviations"] = wanted[f"{copy}values"]
        return wanted

    @property
    def format(self) -> int:
        """The oldest format that can say this: 1 knows ids alone, 2 values, 3 their deviations."""
        return 1 if self.code_dim is None else 2 + self.has_deviations

    def to_dict(self) -> dict:
        known = {"format": self.format, **asdict(self)}
        return {key: value for key, value in known.items() if key not in NEWER_FIELDS[self.format]}

    @classmethod
    def from_dict(cls, data: dict) -> "TokenPlan":
        """Raises ValueError: unknown or missing keys, or values out of range."""
        version = data.get("format") if isinstance(data, dict) else None
        version = version if type(version) is int else 0
        known = {"format", *(field.name for field in fields(cls))} - NEWER_FIELDS.get(version, set())
        if not isinstance(data, dict) or set(data) != known or version not in NEWER_FIELDS:
            wrong = sorted(set(data) ^ known) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not an index of format 1, 2 or 3 (unknown or missing: {wrong})")
        try:
            layout = TokenLayout(data["layout"]["kind"], data["layout"]["shape"])
            return cls(**{**{key: data[key] for key in known - {"format"}}, "layout": layout, "classes": tuple(data["classes"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"index has a value of the wrong type: {error}") from error


class TokenShards:
    """Write a token folder, one shard at a time, in any order, from one or several processes.

    Opening a folder that was begun with the same plan resumes it; with another plan it is an error.

        writer = TokenShards("tokens/", plan)
        for shard in writer.missing[rank::world_size]:
            writer.write(shard, tokens, labels=..., captions=..., names=...)
    """

    def __init__(self, folder: str | os.PathLike, plan: TokenPlan):
        self.folder, self.plan = Path(folder), plan
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / "index.json"
        if index.exists():
            begun = read_plan(self.folder).to_dict()
            differing = sorted(key for key, value in plan.to_dict().items() if begun.get(key) != value)
            if differing:
                raise ValueError(f"{self.folder} was begun with other values of {', '.join(differing)}; choose an empty folder")
        elif any(self.folder.glob("shard_*")):
            raise ValueError(f"{self.folder} holds shards but no index.json; choose an empty folder")
        else:
            _write_aside(index, lambda path: path.write_text(json.dumps(plan.to_dict()), encoding="utf-8"))

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not complete yet."""
        return [shard for shard in range(self.plan.num_shards) if not shard_path(self.folder, shard).exists()]

    def write(
        self,
        shard: int,
        tokens: VisualTokens,
        *,
        labels: Sequence[int] | Tensor,
        captions: Sequence[str],
        names: Sequence[str],
        flipped: VisualTokens | None = None,
        deviations: Tensor | None = None,
        flipped_deviations: Tensor | None = None,
    ) -> Path:
        """Write one complete shard and return its path.

        tokens: of the images plan.rows(shard), ids or values as the plan says. flipped: of the same images mirrored, if the plan has flips.
        deviations, flipped_deviations: [m, N, C] of the values of both, if the plan has deviations.
        Raises ValueError: something does not fit the plan.
        """
        m = len(self.plan.rows(shard))
        if (flipped is not None) != self.plan.has_flips:
            raise ValueError(f"the plan says has_flips={self.plan.has_flips}")
        wanted = (self.plan.has_deviations, self.plan.has_deviations and self.plan.has_flips)
        if (deviations is not None, flipped_deviations is not None) != wanted:
            raise ValueError(f"the plan says has_deviations={self.plan.has_deviations}, has_flips={self.plan.has_flips}")
        if not m == len(labels) == len(captions) == len(names):
            raise ValueError(f"shard {shard} has {m} images, got {len(labels)} labels, {len(captions)} captions, {len(names)} names")
        table = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        tensors = {
            "labels": torch.as_tensor(labels, dtype=torch.int64).cpu().contiguous(),
            "caption_ids": torch.tensor([table[caption] for caption in captions], dtype=torch.int32),
        }
        for copy, part, spread in (("", tokens, deviations), ("flipped_", flipped, flipped_deviations)):
            if part is not None:
                name = self.plan.data_name
                found = getattr(part, name)
                if found is None or part.layout != self.plan.layout or len(part) != m:
                    raise ValueError(f"shard {shard} needs {name} of {m} images in the layout {self.plan.layout}")
                shape, _ = self.plan.tensors(shard)[f"{copy}{name}"]
                if found.shape[1] > self.plan.num_tokens or list(found.shape[2:]) != shape[2:]:
                    raise ValueError(f"the plan holds {name} {shape[1:]} an image, got {list(found.shape[1:])}")
                data = torch.full(shape, -1 if name == "ids" else 0, dtype=self.plan.data_dtype)
                data[:, : found.shape[1]] = found.cpu()
                tensors |= {f"{copy}{name}": data, f"{copy}counts": part.counts.cpu().clone()}
                if spread is not None:
                    if spread.shape != part.values.shape:
                        raise ValueError(f"deviations of shape {list(spread.shape)} for values of shape {list(part.values.shape)}")
                    tensors[f"{copy}deviations"] = torch.zeros_like(data)
                    tensors[f"{copy}deviations"][:, : spread.shape[1]] = spread.cpu()
        path = shard_path(self.folder, shard)
        _check_values(tensors, self.plan, f"shard {shard}")
        texts = json.dumps({"captions": list(table), "names": list(names)}, ensure_ascii=False)
        _write_aside(path.with_suffix(".json"), lambda aside: aside.write_text(texts, encoding="utf-8"))
        _write_aside(path, lambda aside: save_file(tensors, aside))
        return path


class TokenFolder:
    """A complete token folder in memory: 4 bytes a token, N tokens a row; 2 C bytes a token of C values.

    ids: [n, N] int32 (int64 for codebooks beyond 2^31), -1 in the padding; None where the tokens are continuous.
    values: [n, N, C] float16, 0 in the padding, or None. deviations: of the values, alike, or None. counts: [n] int64.
    labels: [n] int64, -1 when there is none.
    flipped_ids, flipped_values, flipped_deviations, flipped_counts: the same of the mirrored images, or None. captions, names: n texts.
    classes, layout, codebook_size, plan: what index.json says.
    Raises FileNotFoundError: no index, or shards missing. ValueError: a file that does not fit the plan; the message names it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.plan = plan = read_plan(self.folder)
        self.classes, self.layout, self.codebook_size = list(plan.classes), plan.layout, plan.codebook_size
        files = [shard_path(self.folder, shard) for shard in range(self._count_shards())]
        for shard, file in enumerate(files):
            _check_header(file, plan.tensors(shard))
        columns = {name: torch.empty(plan.num_images, *shape[1:], dtype=_dtype(code)) for name, (shape, code) in plan.tensors(0).items()}
        self.captions: list[str] = []
        self.names: list[str] = []
        for shard, file in enumerate(files):
            rows = plan.rows(shard)
            with safe_open(file, framework="pt") as reader:
                part = {name: reader.get_tensor(name) for name in columns}
            _check_values(part, plan, str(file))
            for name, column in columns.items():
                column[rows.start : rows.stop] = part[name]
            captions, names = _read_texts(file.with_suffix(".json"), part["caption_ids"])
            self.captions += captions
            self.names += names
        self.counts, self.labels, self.flipped_counts = columns["counts"], columns["labels"], columns.get("flipped_counts")
        self.ids, self.flipped_ids = columns.get("ids"), columns.get("flipped_ids")
        self.values, self.flipped_values = columns.get("values"), columns.get("flipped_values")
        self.deviations, self.flipped_deviations = columns.get("deviations"), columns.get("flipped_deviations")

    def __len__(self) -> int:
        return self.plan.num_images

    def _count_shards(self) -> int:
        # the plan's number is not trusted to build a list: the folder is listed once
        present = sum(1 for entry in os.scandir(self.folder) if entry.name.startswith("shard_") and entry.name.endswith(".safetensors"))
        if present < self.plan.num_shards:
            missing = f"{self.plan.num_shards - present} of {self.plan.num_shards} shards are missing"
            raise FileNotFoundError(f"{self.folder}: {missing}; run `vistok tokenize` again to resume")
        return self.plan.num_shards

    def read(self, indices: Sequence[int] | Tensor, *, flips: Tensor | None = None) -> VisualTokens:
        """Tokens of some images.

        indices: [B]. flips: [B] bool, take the mirrored image's tokens there; needs a folder with flips.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if flips is not None and not self.plan.has_flips:
            raise ValueError(f"{self.folder} holds no mirrored images; tokenize with flips")
        counts = self.counts[indices]
        if flips is not None:
            counts = torch.where(flips, self.flipped_counts[indices], counts)
        if self.ids is None:
            values = self.values[indices].float()
            if flips is not None:
                values = torch.where(flips[:, None, None], self.flipped_values[indices].float(), values)
            return VisualTokens(None, values, counts, self.layout)
        ids = self.ids[indices].long()
        if flips is not None:
            ids = torch.where(flips[:, None], self.flipped_ids[indices].long(), ids)
        return VisualTokens(ids, None, counts, self.layout)

    def read_deviations(self, indices: Sequence[int] | Tensor, *, flips: Tensor | None = None) -> Tensor | None:
        """Standard deviations [B, N, C] float32 of the values that `read` gives, or None where the folder holds none."""
        if self.deviations is None:
            return None
        indices = torch.as_tensor(indices, dtype=torch.int64)
        found = self.deviations[indices]
        if flips is not None:
            found = torch.where(flips[:, None, None], self.flipped_deviations[indices], found)
        return found.float()


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.safetensors"


def read_plan(folder: str | os.PathLike) -> TokenPlan:
    """The plan of a token folder. Raises FileNotFoundError: there is none; ValueError: it is not valid."""
    index = Path(folder) / "index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is not a token folder: it has no index.json")
    try:
        return TokenPlan.from_dict(_read_json(index, MAX_INDEX_BYTES))
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error


def _read_json(path: Path, max_bytes: int):
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path.stat().st_size} bytes, more than the {max_bytes} allowed")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_texts(path: Path, caption_ids: Tensor) -> tuple[list[str], list[str]]:
    m = len(caption_ids)
    try:
        data = _read_json(path, MAX_INDEX_BYTES + MAX_ROW_TEXT_BYTES * m)
        table, names = data["captions"], data["names"]
        if not all(isinstance(text, str) for text in (*table, *names)) or len(names) != m:
            raise ValueError(f"expected {m} names and a table of captions")
        if not 0 <= int(caption_ids.min()) <= int(caption_ids.max()) < len(table):
            raise ValueError("a caption id lies outside the table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return [table[i] for i in caption_ids.tolist()], names


def _check_header(file: Path, wanted: dict[str, tuple[list[int], str]]) -> None:
    """Compare names, shapes and types with the plan before a byte of data is read."""
    try:
        with safe_open(file, framework="pt") as reader:
            found = {name: (list(part.get_shape()), part.get_dtype()) for name in reader.keys() for part in [reader.get_slice(name)]}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file: {error}") from error
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{file}: {name} is {found.get(name, 'missing')}, the plan says {wanted.get(name, 'nothing')}")


def _check_values(tensors: dict[str, Tensor], plan: TokenPlan, where: str) -> None:
    labels = tensors["labels"]
    if int(labels.min()) < -1 or (plan.classes and int(labels.max()) >= len(plan.classes)):
        raise ValueError(f"{where}: a label lies outside the {len(plan.classes)} classes")
    for copy in ("", "flipped_") if plan.has_flips else ("",):
        data, counts = tensors[f"{copy}{plan.data_name}"], tensors[f"{copy}counts"]
        if int(counts.min()) < 1 or int(counts.max()) > plan.num_tokens:
            raise ValueError(f"{where}: {copy}counts must lie in [1, {plan.num_tokens}]")
        valid = torch.arange(plan.num_tokens) < counts[:, None]
        if plan.codebook_size is None:
            if not bool(data.isfinite().all()) or bool((data[~valid] != 0).any()):
                raise ValueError(f"{where}: {copy}values must be finite in half precision, and be 0 in the padding")
            spread = tensors.get(f"{copy}deviations")
            if spread is not None and (not bool((spread.isfinite() & (spread >= 0)).all()) or bool((spread[~valid] != 0).any())):
                raise ValueError(f"{where}: {copy}deviations must be finite in half precision, not negative, and 0 in the padding")
            continue
        ids = data
        if bool(((ids < 0) & valid).any()) or int(ids.max()) >= plan.codebook_size or bool(((ids != -1) & ~valid).any()):
            raise ValueError(f"{where}: {copy}ids must lie in [0, {plan.codebook_size}), and be -1 in the padding")


def _dtype(code: str) -> torch.dtype:
    return next(dtype for dtype, name in DATA_DTYPES.items() if name == code)


def _write_aside(path: Path, write) -> None:
    """Write a file under another name, flush it to disk and rename it: it is complete or absent."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
