"""Images as words of a language model: `<img_00042>` tokens in any Hugging Face tokenizer and model.

Ge et al. 2023, arXiv 2310.01218 (SEED-LLaMA), section 3.2, for any discrete image tokenizer of this package:

    vocabulary   words | <img_00000> ... <img_K-1> | <img> </img>         code c is word first_id + c
    an image     <img> code code ... code </img>

The language model stays a stock one: tune it on interleaved text and images with any trainer, generate with its own `generate`.

    vocabulary = ImageVocabulary.of(image_tokenizer)
    vocabulary.extend(text_tokenizer, language_model)
    ids = vocabulary.encode(["A red apple:", image_tokenizer.encode(image), "and more text."], text_tokenizer)
    out = language_model.generate(..., prefix_allowed_tokens_fn=vocabulary.grammar(text_tokenizer))
    parts = vocabulary.decode(out[0], text_tokenizer)

K codes, d width of the language model's embeddings.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.tokens import TokenLayout, VisualTokens

FILE_NAME = "image_vocabulary.json"
MAX_FILE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ImageVocabulary:
    """The words of an image tokenizer, and how many of them an image has."""

    codebook_size: int
    """K."""
    layout_kind: str
    layout_shape: tuple[int, ...] | tuple[tuple[int, int], ...]
    """Layout of the image tokenizer's tokens."""
    min_tokens: int
    max_tokens: int
    """Codes an image may have."""
    template: str = "<img_{:05d}>"
    """Word of a code."""
    start: str = "<img>"
    end: str = "</img>"

    def __post_init__(self):
        shape = tuple(tuple(side) if isinstance(side, list) else side for side in self.layout_shape)
        object.__setattr__(self, "layout_shape", shape)
        if self.codebook_size < 1 or not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"codebook_size={self.codebook_size}, min_tokens={self.min_tokens}, max_tokens={self.max_tokens} do not fit")
        if self.layout.num_tokens != self.max_tokens:
            raise ValueError(f"the layout holds {self.layout.num_tokens} tokens, max_tokens is {self.max_tokens}")
        words = {self.template.format(0), self.template.format(1), self.start, self.end}
        if len(words) < 4:
            raise ValueError(f"template={self.template!r}, start={self.start!r} and end={self.end!r} must make different words")

    @classmethod
    def of(cls, image_tokenizer: Any, **words: str) -> "ImageVocabulary":
        """The vocabulary of a tokenizer of this package; words: template, start, end. Raises ValueError: it has no codebook."""
        if image_tokenizer.codebook_size is None:
            raise ValueError(f"a {type(image_tokenizer).__name__} has no codebook, so its tokens cannot be words")
        return cls(
            codebook_size=image_tokenizer.codebook_size,
            layout_kind=image_tokenizer.layout.kind,
            layout_shape=image_tokenizer.layout.shape,
            min_tokens=image_tokenizer.min_tokens,
            max_tokens=image_tokenizer.max_tokens,
            **words,
        )

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.layout_kind, self.layout_shape)

    @property
    def words(self) -> list[str]:
        """All words in the order of their ids: codes, start, end."""
        return [*(self.template.format(code) for code in range(self.codebook_size)), self.start, self.end]

    # -- a text tokenizer and its model -----------------------------------------------------------------------------------------------

    def extend(self, tokenizer: Any, model: Any = None, *, code_vectors: Tensor | None = None, seed: int = 0) -> None:
        """Add the words to a text tokenizer, and rows for them to a model's input and output embeddings; both are changed in place.

        Adding them twice changes nothing. A new row is the mean of the old ones plus noise of half their deviation. Extend tokenizer and
        model in one call: rows that a model has to spare are started only when the words are new.
        code_vectors: [K, d_code], the image tokenizer's `embed` of all codes: the noise is then a random projection of them, so that
        similar codes start as similar words.
        Raises ValueError: the tokenizer has some of the words already, but not as one block.
        """
        from transformers import AddedToken

        if code_vectors is not None and len(code_vectors) != self.codebook_size:
            raise ValueError(f"code_vectors holds {len(code_vectors)} rows, the vocabulary {self.codebook_size} codes")
        # not "special", else decoding with skip_special_tokens=True would lose the images
        num_added = tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in self.words])
        first = self.first_id(tokenizer)
        if model is None:
            return
        num_rows = model.get_input_embeddings().weight.shape[0]
        if num_rows < len(tokenizer):  # a model may have more rows than its tokenizer has words; never shrink it
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        elif not num_added:
            return
        tables = [model.get_input_embeddings().weight]
        output = model.get_output_embeddings()
        if output is not None and output.weight is not tables[0]:
            tables.append(output.weight)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for table in tables:
                self._fill(table, min(first, num_rows), first, code_vectors, generator)

    def _fill(self, table: Tensor, known: int, first: int, code_vectors: Tensor | None, generator: torch.Generator) -> None:
        """Start rows for the image words in an embedding table, from its first `known` rows."""
        old = table[:known].float()
        mean, deviation = old.mean(0), old.std(0) if known > 1 else torch.zeros_like(old[0])
        count = self.codebook_size + 2
        noise = torch.randn(count, table.shape[1], generator=generator)
        if code_vectors is not None:
            vectors = code_vectors.detach().float().cpu()
            vectors = (vectors - vectors.mean(0)) / vectors.std().clamp_min(1e-6)
            directions = torch.randn(vectors.shape[1], table.shape[1], generator=generator) / vectors.shape[1] ** 0.5
            noise[: self.codebook_size] = vectors @ directions
        table[first : first + count] = (mean + 0.5 * deviation * noise.to(table.device)).to(table.dtype)

    def first_id(self, tokenizer: Any) -> int:
        """Id of code 0; the others follow, then start and end.

        Raises ValueError: the tokenizer lacks the words, or has them in another order.
        """
        ids = tokenizer.convert_tokens_to_ids(self.words)
        unknown = tokenizer.unk_token_id
        known = tokenizer.get_vocab()
        lacking = [word for word, number in zip(self.words, ids) if number is None or number == unknown and word not in known]
        if lacking:
            raise ValueError(f"the text tokenizer lacks {len(lacking)} of the image words ({lacking[0]} ...); extend() adds them")
        if list(ids) != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError("the text tokenizer has the image words in another order, so ids cannot be mapped to codes")
        return ids[0]

    # -- between images, words and ids ------------------------------------------------------------------------------------------------

    def to_text(self, tokens: VisualTokens) -> list[str]:
        """One string an image: start, its codes' words, end."""
        return [self.start + "".join(self.template.format(code) for code in row) + self.end for row in self._rows(tokens)]

    def to_ids(self, tokens: VisualTokens, tokenizer: Any) -> list[list[int]]:
        """One list of word ids an image, start and end included."""
        first = self.first_id(tokenizer)
        start, end = first + self.codebook_size, first + self.codebook_size + 1
        return [[start, *(first + code for code in row), end] for row in self._rows(tokens)]

    def _rows(self, tokens: VisualTokens) -> list[list[int]]:
        if tokens.ids is None:
            raise ValueError("these tokens hold continuous values; only ids can be words")
        rows = [row[:count] for row, count in zip(tokens.ids.tolist(), tokens.counts.tolist())]
        for row in rows:
            if not self.min_tokens <= len(row) <= self.max_tokens or not all(0 <= code < self.codebook_size for code in row):
                raise ValueError(f"an image has {self.min_tokens} to {self.max_tokens} codes in [0, {self.codebook_size}), got {row}")
        return rows

    def encode(self, parts: Sequence[str | VisualTokens], tokenizer: Any, *, add_special_tokens: bool = True) -> list[int]:
        """Word ids of interleaved texts and images (VisualTokens of one or more images).

        add_special_tokens: begin with the tokenizer's beginning-of-sequence token, where it has one.
        """
        ids = [tokenizer.bos_token_id] if add_special_tokens and tokenizer.bos_token_id is not None else []
        for part in parts:
            if isinstance(part, VisualTokens):
                ids += [number for row in self.to_ids(part, tokenizer) for number in row]
            else:
                ids += tokenizer.encode(part, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int] | Tensor, tokenizer: Any, *, skip_special_tokens: bool = True) -> list[str | VisualTokens]:
        """Texts and images (VisualTokens of one image each) of word ids [T], in order.

        Raises ValueError: an image without its end or with a wrong number of codes, a code outside an image.
        """
        first = self.first_id(tokenizer)
        start, end = first + self.codebook_size, first + self.codebook_size + 1
        parts: list[str | VisualTokens] = []
        text: list[int] = []
        codes: list[int] | None = None

        def flush() -> None:
            if text:
                parts.append(tokenizer.decode(text, skip_special_tokens=skip_special_tokens))
                text.clear()

        for position, number in enumerate(ids.tolist() if isinstance(ids, Tensor) else ids):
            is_code = first <= number < start
            if codes is None and number == start:
                flush()
                codes = []
            elif codes is None and not is_code and number != end:
                text.append(number)
            elif codes is None or not is_code and number != end:
                where = "outside an image" if codes is None else "inside an image"
                raise ValueError(f"{tokenizer.convert_ids_to_tokens(number)!r} at position {position} is {where}")
            elif is_code:
                codes.append(number - first)
            elif not self.min_tokens <= len(codes) <= self.max_tokens:
                raise ValueError(f"the image that ends at position {position} has {len(codes)} codes, not {self._allowed}")
            else:
                parts.append(VisualTokens.from_ids(torch.tensor([codes]), self.layout))
                codes = None
        if codes is not None:
            raise ValueError(f"the last image stops after {len(codes)} codes, without {self.end}")
        flush()
        return [part for part in parts if part != ""]

    @property
    def _allowed(self) -> str:
        return f"{self.min_tokens} to {self.max_tokens}" if self.min_tokens < self.max_tokens else f"exactly {self.max_tokens}"

    def grammar(self, tokenizer: Any, *, vocab_size: int | None = None) -> Callable[[int, Tensor], list[int]]:
        """What a transformers model's `generate` takes as `prefix_allowed_tokens_fn`: only whole images are written.

        Inside an image only codes, as many as it must have, then its end; outside no code. End a prompt with `start` to ask for an image.
        vocab_size: words the model may use outside images, len(tokenizer) by default.
        """
        first = self.first_id(tokenizer)
        start, end = first + self.codebook_size, first + self.codebook_size + 1
        codes = list(range(first, start))
        size = len(tokenizer) if vocab_size is None else vocab_size
        text = [number for number in range(size) if not first <= number < start and number != end]

        def allowed(batch: int, ids: Tensor) -> list[int]:
            marks = ((ids == start) | (ids == end)).nonzero()
            if not len(marks) or int(ids[marks[-1, 0]]) == end:
                return text
            written = len(ids) - 1 - int(marks[-1, 0])
            if written < self.min_tokens:
                return codes
            return [*codes, end] if written < self.max_tokens else [end]

        return allowed

    # -- on disk ----------------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write image_vocabulary.json, beside the text tokenizer's and the language model's files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageVocabulary":
        """Read image_vocabulary.json. Raises OSError: there is none. ValueError: it is not one."""
        from vistok.modeling import config_from_dict, read_json

        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise OSError(f"{folder} has no {FILE_NAME}")
        return config_from_dict(cls, read_json(path, max_bytes=MAX_FILE_BYTES), where=str(path))
