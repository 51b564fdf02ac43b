"""Train a small vision-language model of transformers' LLaVA form on question scenes, tower and language model in one run.

    <s> [64 image tokens] question ? answer </s> question ? answer </s> ...        several questions about one picture in one sequence

    loss = CE(answer tokens) + CE(the words for what lies under each patch and for its place, said by the language model at its image token)
         + CE(what lies under each patch) + CE(in which cell it lies) + BCE(what is in the picture; class token)   of the tower

The language model reads the tower's features without sending gradients back, as LLaVA does with its frozen CLIP (Liu et al. 2023,
arXiv 2304.08485): the tower recognises, and every hop of a question has to be made in the language model. That is what makes the model a
subject for pruning inside it. B pictures, L tokens of a sequence, N image tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vistok.data.scenes import GRID, KINDS, NUM_CONTENTS, PLACES, TEST, TRAIN, QuestionScene, name_of, question_scene, vocabulary
from vistok.image import from_uint8
from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}</s> {% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class SceneVLMConfig:
    """Shape of the model."""

    tower_width: int = 64
    tower_depth: int = 3
    tower_heads: int = 4
    patch_size: int = 8
    width: int = 80
    depth: int = 6
    num_heads: int = 4
    num_key_value_heads: int = 2
    hidden: int = 160
    """Width of the feed-forward layers of the language model."""


@dataclass(frozen=True, kw_only=True)
class VLMTaskConfig:
    """Weights of the losses beside that of the answers."""

    tower_weight: float = 1.0
    naming_weight: float = 1.0
    """Of naming, in the language model, each patch's content and place: without it, answers stay guesses for thousands of steps."""


@dataclass(frozen=True)
class QuestionBatch:
    """images: [B, 3, H, W] in [-1, 1]. ids, targets: [B, L] int64; targets are -100 where nothing is learned. contents: [B, cells]."""

    images: Tensor
    ids: Tensor
    targets: Tensor
    contents: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> "QuestionBatch":
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class QuestionScenes:
    """Scenes without end, as the training loop sees a data set; scene i is a function of i."""

    classes: tuple[str, ...] = KINDS

    def __init__(self, *, split: str = "train", num_questions: int = 8):
        self.split, self.num_questions = TRAIN if split == "train" else TEST, num_questions

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, number: int) -> QuestionScene:
        return question_scene(number, split=self.split, num_questions=self.num_questions)


def scene_processor(config: SceneVLMConfig):
    """The processor of the model: 64 px pictures in [-1, 1], a tokenizer of whole words, and the chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", IMAGE, *vocabulary()]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[IMAGE], padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    side = GRID * 16
    pictures = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        pictures, fast, patch_size=config.patch_size, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def scene_vlm(config: SceneVLMConfig, processor) -> nn.Module:
    """A LlavaForConditionalGeneration of that shape with fresh weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokens = processor.tokenizer
    vision = CLIPVisionConfig(
        image_size=GRID * 16, patch_size=config.patch_size, hidden_size=config.tower_width, intermediate_size=2 * config.tower_width,
        num_hidden_layers=config.tower_depth, num_attention_heads=config.tower_heads, projection_dim=config.tower_width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokens), hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_key_value_heads, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    whole = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokens.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(GRID * 16 // config.patch_size) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(whole)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokens.pad_token_id, tokens.eos_token_id
    return model


class VLMTask(TrainingTask):
    """model: what `scene_vlm` made, with its processor."""

    def __init__(self, model: nn.Module, processor, config: VLMTaskConfig):
        super().__init__()
        self.model, self.processor, self.config = model, processor, config
        width = model.config.vision_config.hidden_size
        self.contents_head, self.cell_head = nn.Linear(width, NUM_CONTENTS), nn.Linear(width, GRID**2)
        self.presence_head = nn.Linear(width, NUM_CONTENTS - 1)
        tokens = processor.tokenizer
        self._number = tokens.get_vocab()
        self._prompt = [tokens.bos_token_id] + [model.config.image_token_id] * model.config.image_seq_length
        words = torch.tensor([self._number[name_of(content)] for content in range(NUM_CONTENTS)])
        self.register_buffer("words", words, persistent=False)  # [NUM_CONTENTS]: the token that names each content
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        edge = torch.arange(side) * GRID // side
        self.register_buffer("cells", (edge[:, None] * GRID + edge).flatten(), persistent=False)  # [N]: the cell each patch lies in
        places = torch.tensor([self._number[place] for place in PLACES])
        self.register_buffer("places", places[self.cells], persistent=False)  # [N]: the token that names it
        self.register_buffer("patches", torch.arange(side**2), persistent=False)

    def describe(self) -> dict:
        return {**super().describe(), "model_config": self.model.config.to_dict()}

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int) -> Iterator[QuestionBatch]:
        """Batches of scenes number start, start + 1, ...; each process takes every world_size-th."""
        while True:
            yield self.batch([self.dataset[number] for number in range(start + rank, start + config.micro_batch_size, world_size)])
            start += config.micro_batch_size

    def batch(self, scenes: list[QuestionScene]) -> QuestionBatch:
        """Scenes as one padded batch."""
        rows, marks = zip(*(self._sequence(scene) for scene in scenes), strict=True)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        learned = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in marks], batch_first=True)
        contents = torch.stack([torch.from_numpy(scene.contents).flatten() for scene in scenes])
        images = from_uint8(torch.stack([scene.image for scene in scenes]))
        positions = torch.tensor([scene.number for scene in scenes])
        return QuestionBatch(images, ids, ids.where(learned, -100), contents, positions)

    def _sequence(self, scene: QuestionScene) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and which of them are answers."""
        row, is_answer = list(self._prompt), [False] * len(self._prompt)
        for question in scene.questions:
            asked, answer = ([self._number[word] for word in text.split()] for text in (question.text, question.answer))
            row += [*asked, *answer, self.processor.tokenizer.eos_token_id]
            is_answer += [False] * len(asked) + [True] * (len(answer) + 1)
        return row, is_answer

    def forward(self, batch: QuestionBatch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of one micro batch; `answers` is the share of answer tokens (ends included) that are right. No random draws."""
        tower = self.model.model.vision_tower(pixel_values=batch.images, return_dict=True)
        patches = tower.last_hidden_state[:, 1:]  # [B, N, D]
        under = batch.contents[:, self.cells]
        contents = F.cross_entropy(self.contents_head(patches).flatten(0, 1), under.flatten())
        cell = F.cross_entropy(self.cell_head(patches).flatten(0, 1), self.cells.expand_as(under).flatten())
        present = F.one_hot(batch.contents, NUM_CONTENTS).amax(dim=1)[:, 1:]
        presence = F.binary_cross_entropy_with_logits(self.presence_head(tower.pooler_output), present.float())
        features = self.model.model.multi_modal_projector(patches.detach())
        words = self.model.get_input_embeddings()(batch.ids)
        inputs = torch.cat([words[:, :1], features.to(words.dtype), words[:, 1 + features.shape[1] :]], dim=1)
        hidden = self.model.model.language_model(inputs_embeds=inputs[:, :-1], use_cache=False).last_hidden_state
        target = batch.targets[:, 1:]
        is_asked = target >= 0
        logits = self.model.lm_head(hidden[is_asked])
        answers = F.cross_entropy(logits, target[is_asked])
        names = self.model.lm_head(hidden[:, 1 : 1 + features.shape[1]]).log_softmax(dim=-1)  # [B, N, V]
        naming = -(names.gather(2, self.words[under][..., None]) + names[:, self.patches, self.places, None]).mean() / 2
        logs = {
            "answer_loss": answers, "naming_loss": naming, "contents_loss": contents, "cell_loss": cell, "presence_loss": presence,
            "answers": (logits.argmax(dim=-1) == target[is_asked]).float().mean(),
            "contents": (self.contents_head(patches).argmax(dim=-1) == under).float().mean(),
        }  # fmt: skip
        loss = answers + self.config.naming_weight * naming + self.config.tower_weight * (contents + cell + presence)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """The share of held-out answers that are right in every word, for each kind of question."""
        right = {kind: [] for kind in KINDS}
        scenes = [question_scene(number, split=TEST) for number in range(64)]
        batch = self.batch(scenes).to(self.cells.device)
        logits = self.model(input_ids=batch.ids, pixel_values=batch.images).logits[:, :-1]
        is_right = ((logits.argmax(dim=-1) == batch.targets[:, 1:]) | (batch.targets[:, 1:] < 0)).cpu()
        for row, scene in enumerate(scenes):
            end = len(self._prompt)
            for question in scene.questions:
                start = end + len(question.text.split())
                end = start + len(question.answer.split()) + 1
                right[question.kind].append(bool(is_right[row, start - 1 : end - 1].all()))
        return {f"held_out_{kind}": sum(found) / max(1, len(found)) for kind, found in right.items()}

    def save_pretrained(self, folder: Path) -> None:
        """A folder of transformers, weights in float16, with its processor."""
        folder.mkdir(parents=True, exist_ok=True)
        half = {
            name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=half)
        self.processor.save_pretrained(folder)
