"""Images to train on: folders, the bundled emoji, Hugging Face data sets; batches in a resumable order; shards of tokens."""

from vistok.data.base import BadImages, ImageDataset, read_all
from vistok.data.emoji import EmojiDataset
from vistok.data.folder import ImageFolder
from vistok.data.hub import HubDataset, HubStream
from vistok.data.loader import Batch, BatchLoader
from vistok.data.order import SampleOrder
from vistok.data.shards import TokenFolder, TokenPlan, TokenShards
from vistok.data.source import open_dataset

__all__ = [
    "BadImages",
    "Batch",
    "BatchLoader",
    "EmojiDataset",
    "HubDataset",
    "HubStream",
    "ImageDataset",
    "ImageFolder",
    "SampleOrder",
    "TokenFolder",
    "TokenPlan",
    "TokenShards",
    "open_dataset",
    "read_all",
]
